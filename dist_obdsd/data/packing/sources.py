"""The files of a folder, an archive, or a folder with archives.

Archives are extracted into a temporary folder, so that what follows only reads plain files.
"""

import logging
import os
import posixpath
import stat
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from dist_obdsd.errors import InputError, UserError
from dist_obdsd.files import read_file, readable_name

ZIP_MARKS = (b"PK\x03\x04", b"PK\x05\x06")  # with members, without
COMPRESSED_MARKS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class File:
    name: str
    """Within the tree, with forward slashes."""
    where: str
    """Its path for messages: of a file in an archive, where it would lie were that extracted."""
    path: Path

    def read(self, size: int = -1) -> bytes:
        """Return the content, or its first ``size`` bytes."""
        return read_file(self.path, size)


class Tree:
    """The files of a source. Names are relative, with forward slashes."""

    def __init__(self, source: Path, archives: Sequence[str], scratch: Path) -> None:
        """Find the files; see ``list_samples`` for the rest.

        Args:
            source: a folder, an archive, or a file in a folder (``given`` is then its name, the tree its folder).
            archives: see ``FileReader.archives``.
        """
        self.source, self._top = source, source
        self.given: str | None = None
        self.is_archive = False
        extracted = scratch / "extracted"
        extracted.mkdir()
        self._roots = [extracted, source]
        if source.is_dir():
            for name in [base + archive for base in _bases(source) for archive in archives]:
                path = source / name
                if path.is_file() and not path.with_name(path.name.split(".")[0]).is_dir():
                    _extract(path, (extracted / name).parent)
        elif not source.is_file():
            if source.exists():
                raise InputError(f"the source {source} is no plain file; give a folder or an archive")
            raise InputError(f"the source {source} does not exist; give the folder or the archive with the download")
        elif _start(source).startswith((*ZIP_MARKS, *COMPRESSED_MARKS)) or tarfile.is_tarfile(source):
            _extract(source, extracted)
            self._roots, self.is_archive = [extracted], True
        else:
            self._roots, self._top, self.given = [source.parent], source.parent, source.name

    @property
    def bases(self) -> list[str]:
        """List where a download may begin: the top ("") and every folder there ("NAME/")."""
        return [""] if self.given is not None else sorted({base for root in self._roots for base in _bases(root)})

    def find(self, name: str) -> File | None:
        """Find the file of a name that does not point outside (see ``inside``)."""
        paths = (root / name for root in self._roots)
        return next((File(name, str(self._top / name), path) for path in paths if path.is_file()), None)

    def files(self) -> list[File]:
        """List all files, without hidden ones and the folders that macOS adds to archives."""
        return [
            replace(file, where=readable_name(str(self._top / file.name)))
            for root in self._roots
            for file in walk(root)
            if "__MACOSX" not in file.name.split("/")
        ]


def inside(name: str) -> str | None:
    """Return a relative path in its shortest form, or None where it may point outside."""
    if posixpath.isabs(name) or ".." in name.split("/") or "\\" in name or ":" in name.split("/")[0]:
        return None
    return posixpath.normpath(name)


def walk(folder: Path, prefix: str = "", above: tuple[tuple[int, int], ...] = ()) -> Iterator[File]:
    """List the files below a folder but hidden ones; links are followed once."""
    folders, files = _listed(folder)
    here = folder.stat()
    place = (here.st_dev, here.st_ino)
    if place in above:
        return
    for name in files:
        yield File(prefix + readable_name(name), readable_name(str(folder / name)), folder / name)
    for name in folders:
        yield from walk(folder / name, f"{prefix}{readable_name(name)}/", (*above, place))


def _listed(folder: Path) -> tuple[list[str], list[str]]:
    """List the folders and the other files in a folder, sorted, without hidden ones."""

    def refuse(error: OSError) -> NoReturn:
        raise InputError(f"cannot read the folder {folder}: {error.strerror}; check its permissions") from error

    _, *kinds = next(os.walk(folder, onerror=refuse))
    folders, files = (sorted(name for name in names if not name.startswith(".")) for names in kinds)
    return folders, files


def _bases(folder: Path) -> list[str]:
    """List the top ("") and every folder there ("NAME/")."""
    return ["", *(f"{name}/" for name in _listed(folder)[0])]


def _start(path: Path) -> bytes:
    try:
        return read_file(path, 8)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check its permissions") from error


def _extract(archive: Path, folder: Path) -> None:
    extract = _extract_zip if _start(archive).startswith(ZIP_MARKS) else _extract_tar
    logger.info("extracting %s", archive)
    try:
        extract(archive, folder)
    except Exception as error:  # broken archives raise nearly every built-in type
        if isinstance(error, UserError) or getattr(error, "errno", None):  # the disk is full
            raise
        raise InputError(f"cannot open {archive}: {' '.join(str(error).split())}; download it again") from error


def _extract_zip(path: Path, folder: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            _check_member(path, member.filename, is_plain=not stat.S_ISLNK(member.external_attr >> 16))
        archive.extractall(folder)


def _extract_tar(path: Path, folder: Path) -> None:
    with tarfile.open(path) as archive:

        def checked() -> Iterator[tarfile.TarInfo]:
            for member in archive:
                _check_member(path, member.name, is_plain=member.isdir() or member.isreg())
                yield member

        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.0 to 3.11.3 have none
        archive.extractall(folder, checked())
        # The library takes a tar that breaks off between two members for a whole one.
        assert archive.fileobj is not None
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it breaks off before its end")
        while archive.fileobj.read(2**20):  # to the check sum of a compressed one
            pass


def _check_member(path: Path, name: str, is_plain: bool) -> None:
    if inside(name) is None:
        raise InputError(f"{path} holds {name!r}, a path that points outside of it; download the archive again")
    if not is_plain:
        raise InputError(
            f"{path} holds {name!r}, which is a link or another thing that is no plain file and may point outside; "
            f"download the archive again, or extract it and give the folder"
        )
