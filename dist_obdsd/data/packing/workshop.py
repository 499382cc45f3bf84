"""A folder that appears whole or not at all: filled beside its target under another name and renamed at the end."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dist_obdsd.errors import InputError, RunError


@contextmanager
def workshop(out: Path) -> Iterator[Path]:
    """An empty ``OUT.packing``, held by a lock; the caller publishes it, and an exception or Ctrl-C removes it."""
    folder = out.with_name(out.name + ".packing")
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some network file systems cannot lock a folder; packing goes on there without this guard.
            if error.errno == errno.EWOULDBLOCK:
                raise InputError(f"another process is packing to {out}; wait for it or choose another --out") from error
        try:
            _empty(folder)  # what a killed process left
            yield folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        os.close(handle)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_synced(path: Path, data: bytes) -> None:
    """Write a file down to the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(folder: Path, out: Path) -> None:
    """Rename the finished folder to the target. A packed folder in its place is moved aside first and removed last."""
    previous = out.with_name(out.name + ".replaced")
    if previous.exists():
        shutil.rmtree(previous)
    if (out / "manifest.json").exists():
        out.rename(previous)
    _sync(folder)
    folder.rename(out)
    _sync(out.parent)
    if previous.exists():
        shutil.rmtree(previous)


def storage_error(error: OSError, out: Path) -> InputError | RunError:
    """The sentence for a full disk, a forbidden place or a failing device."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(f"packing to {out} stopped: {reason}; free some space or choose another --out")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return InputError(f"cannot write {error.filename or out}: {reason}; choose an --out that you may write to")
    where = f" at {error.filename}" if error.filename else ""
    return RunError(f"packing to {out} stopped{where}: {reason}; nothing was kept, so start it again")
