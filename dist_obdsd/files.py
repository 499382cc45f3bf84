"""Files that appear whole or not at all."""

import os
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
        raise RunError(f"cannot write {path}: {error.strerror}; free some space or choose another output") from error
