"""A folder of remote shards that were read before, shared by processes and nodes.

A shard's file is called by its SHA-256, so two data sets never collide. It is downloaded beside its place, checked and
renamed. A lock lets one process download while others wait. A shard that is evicted can still be read by whoever has it
open.
"""

import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from filelock import FileLock

from dist_obdsd.data.manifest import Shard
from dist_obdsd.data.remote import NO_ROOM, fetch, shown
from dist_obdsd.errors import InputError, RunError

ABANDONED = 3600.0  # seconds after which a download that nobody writes to is removed
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Cache:
    def __init__(self, folder: Path, limit: int | None = None) -> None:
        """Make the folder, for at most ``limit`` bytes, and remove dead downloads."""
        self.folder, self._limit = folder, limit
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot use data.cache={folder}: {error.strerror}; choose another folder") from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise InputError(f"cannot write to data.cache={folder}; choose a folder that you may write to")
        for part in folder.glob("*.part"):
            with suppress(OSError):
                if time.time() - part.stat().st_mtime > ABANDONED:
                    part.unlink()

    def path(self, shard: Shard) -> Path:
        """Return the place of a shard once it is here."""
        if not _SHA256.fullmatch(shard.sha256):
            raise InputError(
                f"the manifest has {shard.sha256!r} as SHA-256 of shard {shard.file}, which the cache needs; write the "
                f"64 hexadecimal digits there, or leave data.cache out"
            )
        return self.folder / f"{shard.sha256}.tar"

    @contextmanager
    def open(self, shard: Shard, url: str) -> Iterator[IO[bytes]]:
        """Open a shard's tar, downloaded if need be.

        Raises:
            InputError: the shard is larger than the whole cache, or has no SHA-256.
            RunError: it cannot be downloaded, or the disk is full.
        """
        path = self.path(shard)
        while not (file := _open_whole(path, shard.bytes)):
            if self._limit is not None and shard.bytes > self._limit:
                raise InputError(
                    f"shard {shard.file} has {shard.bytes / 2**30:.3g} GiB but data.cache_gib allows "
                    f"{self._limit / 2**30:.3g} for all; raise it or leave data.cache out"
                )
            try:
                self._download(path, shard, url)
            except OSError as error:
                reason = error.strerror or str(error)
                room = "free some space, set or lower data.cache_gib, " if error.errno in NO_ROOM else ""
                raise RunError(
                    f"cannot write {shown(url)} to data.cache={self.folder}: {reason}; {room}choose another folder, or "
                    f"leave data.cache out"
                ) from error
        with file:
            yield file

    def _download(self, path: Path, shard: Shard, url: str) -> None:
        # Unique, since some file systems have no locks.
        part = path.with_suffix(f".{uuid.uuid4().hex}.part")
        with ExitStack() as stack:
            stack.callback(part.unlink, missing_ok=True)
            with suppress(OSError, NotImplementedError):
                stack.enter_context(FileLock(f"{path}.lock", mode=0o666))
            if path.exists():  # another process has just finished it
                return
            with part.open("w+b") as file:
                file.truncate(shard.bytes)  # at once, so that others who make room count it
                self._make_room()
                fetch(url, file, shard.bytes, shard.sha256)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)

    def _make_room(self) -> None:
        """Remove the shards that were not used for longest, down to the limit."""
        if self._limit is None:
            return
        found = []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):  # another process removed it
                found.append((path.stat().st_mtime, path.stat().st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total > self._limit and path.suffix == ".tar":
                path.unlink(missing_ok=True)
                total -= size


def _open_whole(path: Path, size: int) -> IO[bytes] | None:
    """Open a file that has its whole size, and note the time, which eviction goes by."""
    with suppress(FileNotFoundError):
        file = path.open("rb")
        if os.fstat(file.fileno()).st_size == size:
            with suppress(OSError):  # another user's file, which we may only read
                os.utime(path)
            return file
        file.close()  # somebody wrote into it
        path.unlink(missing_ok=True)
    return None
