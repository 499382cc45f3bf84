"""Files that appear whole or not at all."""

import errno
import fcntl
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from dist_obdsd.errors import InputError, RunError


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that replaces ``path``, on disk, when the block ends without error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")  # several ranks may report a failure at once
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # where even its folder is gone, the first error says more
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a folder that replaces ``path`` when the block ends without error.

    The block writes into ``PATH.writing``, which a lock holds: a second process meets an InputError.
    """
    folder, previous = path.with_name(path.name + ".writing"), path.with_name(path.name + ".replaced")
    folder.mkdir(parents=True, exist_ok=True)
    with _opened(folder) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some network file systems cannot lock a folder; writing goes on there without this guard.
            if error.errno == errno.EWOULDBLOCK:
                raise InputError(f"another process writes to {path}; wait for it or choose another place") from error
        try:
            _remove(*folder.iterdir())  # what a killed process left
            yield folder
            for file in (*(found for found in folder.rglob("*") if found.is_file()), folder):
                _sync(file)
            _remove(previous)
            if path.exists():
                path.rename(previous)
            folder.rename(path)
            _sync(path.parent)
            _remove(previous)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def read_file(path: str | Path, size: int = -1) -> bytes:
    """Read a plain file, or its first ``size`` bytes; a named pipe is an OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "it is no plain file", str(path))
        return file.read(size)


def readable_name(name: str) -> str:
    r"""Return a file's name as text on one line, with other bytes escaped."""
    try:
        name = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        name = name.encode("utf-8", "backslashreplace").decode()
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda control: control[0].encode("unicode_escape").decode(), name)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file: a reader sees the old content or the new, also after a crash."""
    try:
        with replacing(path) as file:
            file.write(data)
    except OSError as error:
        reason = why_not_written(error, path.parent, len(data))
        raise RunError(f"cannot write {path}: {reason}; free some space or choose another output") from error


def why_not_written(error: OSError, folder: Path, needed: int) -> str:
    """Explain a failed write; for a full disk with the bytes that are needed and free."""
    if error.errno != errno.ENOSPC:
        return error.strerror or str(error)
    free = shutil.disk_usage(folder).free
    return f"{error.strerror}, since {needed:,} bytes are needed and {free:,} bytes are free"


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    handle = os.open(path, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


def _sync(path: Path) -> None:
    with _opened(path) as handle:
        os.fsync(handle)


def _remove(*paths: Path) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
