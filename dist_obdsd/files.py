"""Files that appear whole or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from dist_obdsd.errors import RunError


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` when the block ends, whole and on the disk; not at all if it fails."""
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


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old content or the new one, also after a crash."""
    try:
        with replacing(path) as file:
            file.write(data)
    except OSError as error:
        reason = why_not_written(error, path.parent, len(data))
        raise RunError(f"cannot write {path}: {reason}; free some space or choose another output") from error


def why_not_written(error: OSError, folder: Path, needed: int) -> str:
    """What the system says of a failed write; of a full disk also how many bytes it has and how many are needed."""
    if error.errno != errno.ENOSPC:
        return error.strerror or str(error)
    free = shutil.disk_usage(folder).free
    return f"{error.strerror}, since {_size(needed)} are needed and {_size(free)} are free"


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count >= 2**20 else f"{count:,} bytes"
