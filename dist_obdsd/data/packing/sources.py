"""The files of a folder, an archive, or a folder with archives, not extracted.

A compressed tar can only be read from front to back, so it is decompressed once, into a temporary file without a name,
which the system removes in any case.
"""

import bz2
import gzip
import lzma
import os
import posixpath
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from dist_obdsd.errors import InputError, RunError
from dist_obdsd.files import read_file, readable_name

DECOMPRESSORS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
ZIP_MARKS = (b"PK\x03\x04", b"PK\x05\x06")  # with members, without


@dataclass(frozen=True)
class File:
    name: str
    """Within the tree, with forward slashes."""
    where: str
    """Its path on the disk, or the archive's path and the name in it; for messages."""
    read: Callable[..., bytes]
    """Returns the content, or its first bytes where it is called with a number of them."""
    path: Path | None = None
    """Its path on the disk; None in an archive."""


class Tree:
    """The files of a source. Names are relative, with forward slashes."""

    def __init__(self, source: Path, archives: Sequence[str], scratch: Path | None, stack: ExitStack) -> None:
        """Open a source until ``stack`` ends; see ``open_samples`` for the rest.

        Args:
            source: a folder, an archive, or a file in a folder (``given`` is then its name, the tree its folder).
            archives: see ``FileReader.archives``.
        """
        self.source = source
        self.folder: Path | None = None
        self.given: str | None = None
        self._packed: dict[str, File] = {}
        if source.is_dir():
            self.folder = source
            for prefix in ("", *self._subfolders()):
                for archive in archives:
                    path = source / prefix / archive
                    if path.is_file() and not path.with_name(path.name.split(".")[0]).is_dir():
                        self._packed |= _index(path, posixpath.dirname(prefix + archive), scratch, stack)
        elif not source.is_file():
            if source.exists():
                raise InputError(f"the source {source} is no plain file; give a folder or an archive")
            raise InputError(f"the source {source} does not exist; give the folder or the archive with the download")
        elif _start(source).startswith((*ZIP_MARKS, *DECOMPRESSORS)) or tarfile.is_tarfile(source):
            self._packed = _index(source, "", scratch, stack)
        else:
            self.folder, self.given = source.parent, source.name

    def _subfolders(self) -> list[str]:
        if self.folder is None:
            return []
        return [f"{entry.name}/" for entry in _entries(self.folder) if _is_folder(entry)]

    @property
    def bases(self) -> list[str]:
        """List where a download may begin: the top ("") and every folder there ("NAME/")."""
        if self.given is not None:
            return [""]
        packed = {name.split("/")[0] + "/" for name in self._packed if "/" in name}
        return ["", *sorted({*self._subfolders(), *packed})]

    def find(self, name: str) -> File | None:
        """Find the file of a name that does not point outside (see ``inside``)."""
        if (packed := self._packed.get(name)) is not None:
            return packed
        if self.folder is None or not (path := self.folder / name).is_file():
            return None
        return File(name, str(path), partial(read_file, path))

    def files(self) -> list[File]:
        """List all files, without hidden ones and the folders that macOS adds to archives."""
        found = [*self._packed.values(), *(walk(self.folder) if self.folder is not None else ())]
        return [file for file in found if not any(part.startswith((".", "__MACOSX")) for part in file.name.split("/"))]


def inside(name: str) -> str | None:
    """Return a relative path in its shortest form, or None where it may point outside."""
    if posixpath.isabs(name) or ".." in name.split("/") or "\\" in name or ":" in name.split("/")[0]:
        return None
    return posixpath.normpath(name)


def walk(folder: Path, prefix: str = "", above: tuple[tuple[int, int], ...] = ()) -> Iterator[File]:
    """List the files below a folder but hidden ones; links are followed once."""
    entries = _entries(folder)
    here = folder.stat()
    place = (here.st_dev, here.st_ino)
    if place in above:
        return
    for entry in entries:
        path, name = folder / entry.name, prefix + readable_name(entry.name)
        if _is_folder(entry):
            yield from walk(path, f"{name}/", (*above, place))
        else:
            yield File(name, readable_name(str(path)), partial(read_file, path), path)


def _start(path: Path) -> bytes:
    try:
        return read_file(path, 8)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check its permissions") from error


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        found = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"cannot read the folder {folder}: {error.strerror}; check its permissions") from error
    return [entry for entry in found if not entry.name.startswith(".")]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # A link that leads nowhere is a file that cannot be read, with its reason.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _index(path: Path, prefix: str, scratch: Path | None, stack: ExitStack) -> dict[str, File]:
    """List an archive's files below ``prefix``; the last of a name counts."""
    found = {}
    try:
        zipped = _start(path).startswith(ZIP_MARKS)
        for name, read in _zip_members(path, stack) if zipped else _tar_members(path, scratch, stack):
            if (inner := inside(name)) is None:
                raise InputError(f"{path} holds {name!r}, a path that points outside of it; download the archive again")
            if read is not None:
                inner = readable_name(inner)
                file = File(posixpath.join(prefix, inner), f"{path}/{inner}", read)
                found[file.name] = file
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        raise InputError(f"cannot open {path}: {error}; download it again") from error
    return found


Members = Iterator[tuple[str, Callable[..., bytes] | None]]
"""Names, and how to read a file; None for a folder."""


def _zip_members(path: Path, stack: ExitStack) -> Members:
    archive = stack.enter_context(zipfile.ZipFile(path))
    for info in archive.infolist():
        if stat.S_ISLNK(info.external_attr >> 16):
            raise _no_file(path, info.filename)
        yield info.filename, None if info.is_dir() else partial(_read_member, archive, info)


def _tar_members(path: Path, scratch: Path | None, stack: ExitStack) -> Members:
    file = _decompressed(path, scratch, stack)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if not (member.isdir() or member.isreg()) or member.issparse():
                raise _no_file(path, member.name)
            yield member.name, None if member.isdir() else partial(_read_at, file, member)
        # The library takes a tar that breaks off between two members for a whole one.
        if os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it breaks off before its end")


def _decompressed(path: Path, scratch: Path | None, stack: ExitStack) -> IO[bytes]:
    """Open a tar, or what it is when decompressed, in a temporary file."""
    start = _start(path)
    opener = next((opener for mark, opener in DECOMPRESSORS.items() if start.startswith(mark)), None)
    if opener is None:
        return stack.enter_context(path.open("rb"))
    try:
        file = stack.enter_context(tempfile.TemporaryFile(dir=scratch))  # noqa: SIM115
        with opener(path) as stream:
            shutil.copyfileobj(stream, file, 2**20)
        file.seek(0)
    except OSError as error:
        if error.errno is None:  # of the archive
            raise
        raise RunError(
            f"cannot unpack {path} into a temporary file in {scratch or tempfile.gettempdir()}: {error.strerror}; free "
            f"some space, choose an --out elsewhere, or extract the archive and give the folder"
        ) from error
    return file


def _no_file(path: Path, name: str) -> InputError:
    return InputError(
        f"{path} holds {name!r}, which is a link or another thing that is no plain file and may point outside; "
        f"download the archive again, or extract it and give the folder"
    )


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, size: int = -1) -> bytes:
    with archive.open(info) as file:
        return file.read(size)


def _read_at(file: IO[bytes], member: tarfile.TarInfo, size: int = -1) -> bytes:
    """Read a member of an open tar, whose position others share."""
    wanted = member.size if size < 0 else min(size, member.size)
    data = os.pread(file.fileno(), wanted, member.offset_data)
    if len(data) != wanted:
        raise tarfile.ReadError("unexpected end of data")
    return data
