"""A folder of remote shards that were read before. Several processes, on several machines, may share one.

A shard's file is called by its SHA-256, so two data sets never collide. It is downloaded as ``SHA256.part``, which
the process that downloads has locked, then checked and renamed to ``SHA256.tar``: a file of that name is whole. Whoever
wants the same shard waits for the lock. A process that dies lets go of its lock, so its leftover is recognised and
replaced. On a file system without locks every process downloads under a name of its own, and the last rename wins.

webdataset's own cache does none of this: it knows a shard by the last part of its URL, checks no sum, lets
every process download into its own file, and deletes files that others are reading.
"""

import errno
import fcntl
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from dist_obdsd.data.manifest import Shard
from dist_obdsd.data.remote import fetch, shown
from dist_obdsd.errors import InputError, RunError

ABANDONED = 24 * 3600.0  # seconds after which a leftover is removed where no lock tells whether its process lives
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Cache:
    def __init__(self, folder: Path, limit: int | None = None) -> None:
        """Make the folder where it is missing, and remove what processes left that died in a download.

        Args:
            limit: bytes that all files together may have; None: any number.

        Raises:
            InputError: the folder cannot be made or written to.
        """
        self.folder, self._limit = folder, limit
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
        except OSError as error:
            raise InputError(f"cannot use data.cache={folder}: {error.strerror}; choose another folder") from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise InputError(f"cannot write to data.cache={folder}; choose a folder that you may write to")

    def path(self, shard: Shard) -> Path:
        """Where the shard is, once it is here."""
        if not _SHA256.fullmatch(shard.sha256):
            raise InputError(
                f"the manifest has {shard.sha256!r} as SHA-256 of shard {shard.file}, which the cache needs; write the "
                f"64 hexadecimal digits there, or leave data.cache out"
            )
        return self.folder / f"{shard.sha256}.tar"

    @contextmanager
    def open(self, shard: Shard, url: str) -> Iterator[IO[bytes]]:
        """The shard's tar, downloaded if need be. It is not evicted while it is open.

        Raises:
            InputError: the shard is larger than the whole cache, or has no SHA-256.
            RunError: it cannot be downloaded, or the disk is full.
        """
        path = self.path(shard)
        while True:
            try:
                file = path.open("rb")
            except FileNotFoundError:
                try:
                    self._fill(path, shard, url)
                except OSError as error:
                    raise self._storage_error(error, url) from error
                continue
            with file:
                _lock(file, fcntl.LOCK_SH)
                try:
                    if os.fstat(file.fileno()).st_size != shard.bytes:
                        path.unlink(missing_ok=True)  # somebody wrote into it
                        continue
                    with suppress(OSError):  # another user's file, which we may only read
                        os.utime(path)  # the time of the last use, which eviction goes by
                    yield file
                    return
                finally:
                    _unlock(file)

    def _fill(self, path: Path, shard: Shard, url: str) -> None:
        if self._limit is not None and shard.bytes > self._limit:
            raise InputError(
                f"shard {shard.file} has {shard.bytes / 2**30:.3g} GiB but data.cache_gib allows "
                f"{self._limit / 2**30:.3g} for all; raise it or leave data.cache out"
            )
        with _alone(path) as held:
            if held is None:
                return  # another process has just finished it
            file, part = held
            try:
                # At once as large as it will be, so that others who make room count it.
                file.truncate(shard.bytes)
                self._make_room()
                fetch(url, file, shard.bytes, shard.sha256)
                file.flush()
                os.fsync(file.fileno())
                os.replace(part, path)
            except BaseException:
                with suppress(OSError):
                    part.unlink(missing_ok=True)
                raise

    def _make_room(self) -> None:
        """Remove the shards that were not used for longest until the rest is within the limit, sparing those in use."""
        if self._limit is None:
            return
        found = []
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):  # another process removed it
                if entry.name.endswith((".tar", ".part")):
                    found.append((entry.stat().st_mtime, entry.stat().st_size, Path(entry.path)))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self._limit:
                return
            if path.suffix == ".tar" and _remove_unused(path, always=True):
                total -= size

    def _sweep(self) -> None:
        for part in self.folder.glob("*.part"):
            with suppress(FileNotFoundError, PermissionError):
                _remove_unused(part, always=time.time() - part.stat().st_mtime > ABANDONED)

    def _storage_error(self, error: OSError, url: str) -> RunError:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            advice = "free some space, set or lower data.cache_gib, or choose another data.cache"
            return RunError(f"no room in data.cache={self.folder} for {shown(url)}: {reason}; {advice}")
        return RunError(
            f"cannot write {shown(url)} to data.cache={self.folder}: {reason}; choose another folder, or leave "
            f"data.cache out"
        )


def _lock(file: IO[bytes], kind: int) -> bool:
    """Take the lock, waiting unless LOCK_NB is given; False where the file system has none.

    Raises:
        BlockingIOError: with LOCK_NB, another process has it.
    """
    try:
        fcntl.flock(file.fileno(), kind)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _unlock(file: IO[bytes]) -> None:
    # By name and not by closing: a process that was forked meanwhile has the file open, too.
    with suppress(OSError):
        fcntl.flock(file.fileno(), fcntl.LOCK_UN)


def _remove_unused(path: Path, always: bool) -> bool:
    """Remove a file that nobody has locked; where no lock can tell, only if ``always``. Whether it is gone."""
    try:
        with path.open("r+b") as file:  # some network file systems lock only what is open for writing
            try:
                if _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB) or always:
                    path.unlink(missing_ok=True)
                    return True
                return False
            finally:
                _unlock(file)
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return True


@contextmanager
def _alone(path: Path) -> Iterator[tuple[IO[bytes], Path] | None]:
    """A file to download ``path`` into, and its name; None where another process finished ``path`` meanwhile."""
    part = path.with_suffix(".part")
    while not path.exists():
        with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
            if not _lock(file, fcntl.LOCK_EX) and part.stem == path.stem:
                part.unlink(missing_ok=True)
                part = path.with_suffix(f".{socket.gethostname()}-{os.getpid()}-{threading.get_native_id()}.part")
                continue
            try:
                # Whoever had the lock before may have renamed or removed what was opened here.
                if _is_at(file, part) and not path.exists():
                    yield file, part
                    return
                if _is_at(file, part):
                    part.unlink(missing_ok=True)
            finally:
                _unlock(file)
    yield None


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
