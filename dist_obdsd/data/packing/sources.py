"""The files of a source as one tree: a folder, an archive, or a folder with archives in it. Nothing is extracted.

A member of a zip or of a tar is read where it stands. A compressed tar can only be read from front to back, so it is
decompressed once, into a temporary file without a name, which the system removes in any case.
"""

import bz2
import gzip
import lzma
import os
import posixpath
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
        """Open a source, which stays open with ``stack``.

        Args:
            source: a folder, an archive, or a file in a folder (``given`` is then its name, the tree its folder).
            archives: see ``FileReader.archives``.
            scratch: folder for the temporary file of a compressed tar; None lets the system choose.

        Raises:
            InputError: the source or an archive cannot be read, or an archive holds a path that points outside of it.
            RunError: there is no room for what a compressed tar holds.
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
        elif source.is_file() and is_archive(source):
            self._packed = _index(source, "", scratch, stack)
        elif source.is_file():
            self.folder, self.given = source.parent, source.name
        else:
            raise InputError(f"the source {source} does not exist; give the folder or the archive with the download")

    def _subfolders(self) -> list[str]:
        if self.folder is None:
            return []
        return [f"{entry.name}/" for entry in _entries(self.folder) if _is_folder(entry) and entry.name[0] != "."]

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
        found = list(self._packed.values())
        if self.folder is not None:
            found += walk(self.folder)
        return [file for file in found if not any(part.startswith((".", "__MACOSX")) for part in file.name.split("/"))]


def inside(name: str) -> str | None:
    """Return a relative path in its shortest form, or None where it may point outside."""
    if posixpath.isabs(name) or ".." in name.split("/") or "\\" in name or ":" in name.split("/")[0]:
        return None
    return posixpath.normpath(name)


def is_archive(path: Path) -> bool:
    start = _start(path)
    return start.startswith((*ZIP_MARKS, *DECOMPRESSORS)) or tarfile.is_tarfile(path)


def _start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(8)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check its permissions") from error


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        return sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"cannot read the folder {folder}: {error.strerror}; check its permissions") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # A link that leads nowhere is a file that cannot be read, with its reason.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def walk(folder: Path, prefix: str = "", above: tuple[tuple[int, int], ...] = ()) -> Iterator[File]:
    """List the files below a folder but hidden ones; links are followed once.

    Raises:
        InputError: a folder cannot be read.
    """
    entries = _entries(folder)
    here = folder.stat()
    place = (here.st_dev, here.st_ino)
    if place in above:
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        path, name = folder / entry.name, prefix + readable_name(entry.name)
        if _is_folder(entry):
            yield from walk(path, f"{name}/", (*above, place))
        else:
            yield File(name, readable_name(str(path)), partial(read_file, path), path)


def _index(path: Path, prefix: str, scratch: Path | None, stack: ExitStack) -> dict[str, File]:
    """List an archive's files below ``prefix``; a later member replaces an earlier one."""
    start = _start(path)
    found = {}
    try:
        opener = next((opener for mark, opener in DECOMPRESSORS.items() if start.startswith(mark)), None)
        if start.startswith(ZIP_MARKS):
            members = _zip_members(path, stack)
        elif opener is None:
            members = _tar_members(path, stack.enter_context(path.open("rb")))
        else:
            members = _tar_members(path, _decompressed(path, opener, scratch, stack))
        for name, read in members:
            inner = inside(name)
            if inner is None:
                raise InputError(f"{path} holds {name!r}, a path that points outside of it; download the archive again")
            if read is not None:
                inner = readable_name(inner)
                file = File(posixpath.join(prefix, inner), f"{path}/{inner}", read)
                found[file.name] = file
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        raise InputError(f"cannot open {path}: {error}; download it again") from error
    return found


Members = Iterator[tuple[str, partial[bytes] | None]]
"""Names, and how to read a file; None for a folder."""


def _zip_members(path: Path, stack: ExitStack) -> Members:
    archive = stack.enter_context(zipfile.ZipFile(path))
    for info in archive.infolist():
        if stat.S_ISLNK(info.external_attr >> 16):
            raise _no_file(path, info.filename)
        yield info.filename, None if info.is_dir() else partial(_read_member, archive, info)


def _tar_members(path: Path, file: IO[bytes]) -> Members:
    """List the members of an open tar. A file's bytes stand in one piece at a known place."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            read = partial(_read_at, file, member.offset_data, member.size)
            yield member.name, read if _has_bytes(path, member) else None
        # The library takes a tar that breaks off between two members for a whole one.
        if os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it breaks off before its end")


def _decompressed(path: Path, opener: Any, scratch: Path | None, stack: ExitStack) -> IO[bytes]:
    """Decompress a tar into a temporary file."""
    folder = scratch or Path(tempfile.gettempdir())
    try:
        file: IO[bytes] = stack.enter_context(tempfile.TemporaryFile(dir=folder))  # noqa: SIM115
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}; choose another --out") from error
    with opener(path) as stream:
        while data := stream.read(2**20):
            try:
                file.write(data)
                file.flush()
            except OSError as error:
                raise RunError(
                    f"cannot unpack the archive into a temporary file in {folder}: {error.strerror}; free some space, "
                    f"choose an --out elsewhere, or extract the archive and give the folder"
                ) from error
    file.seek(0)
    return file


def _has_bytes(path: Path, member: tarfile.TarInfo) -> bool:
    """Tell a plain file in a tar from a folder; anything else is refused."""
    if member.isdir():
        return False
    if not member.isreg() or member.issparse():
        raise _no_file(path, member.name)
    return True


def _no_file(path: Path, name: str) -> InputError:
    return InputError(
        f"{path} holds {name!r}, which is a link or another thing that is no plain file and may point outside; "
        f"download the archive again, or extract it and give the folder"
    )


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, size: int = -1) -> bytes:
    with archive.open(info) as file:
        return file.read(size)


def _read_at(file: IO[bytes], start: int, size: int, most: int | None = None) -> bytes:
    """Read at a place of an open file that threads share."""
    size = size if most is None else min(size, most)
    data = os.pread(file.fileno(), size, start)
    if len(data) != size:
        raise OSError(f"{size} bytes are expected at {start} but {len(data)} are there")
    return data
