import os
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from dist_obdsd.data.packing.sources import Tree
from dist_obdsd.errors import InputError
from tests.data.packing.sources import write_archive, write_files

FILES = {"a/1.png": b"one", "a/b/2.png": b"", "3.txt": os.urandom(70_000), "a/long" + "g" * 120 + ".png": b"pax"}
SUFFIXES = ["zip", "tar", "tgz", "tar.bz2", "tar.xz"]


def contents(source: Path, *archives: str) -> dict[str, bytes]:
    with TemporaryDirectory() as scratch:
        return {file.name: file.read() for file in Tree(source, archives, Path(scratch)).files()}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_archive_is_read_like_the_folder_it_was_made_from(tmp_path, suffix: str) -> None:
    folder = write_files(tmp_path / "folder", FILES)
    archive = write_archive(tmp_path / f"x.{suffix}", FILES | {"__MACOSX/a/1.png": b"", "a/._1.png": b"", "./4": b"4"})
    write_files(folder, {".hidden/x.png": b"", "a/.x.png": b"", "4": b"4"})
    other = archive.rename(tmp_path / "of another suffix")
    assert contents(folder) == contents(other) == FILES | {"4": b"4"}
    assert {file.where for file in Tree(other, (), tmp_path).files()} == {f"{other}/{name}" for name in (*FILES, "4")}


OUTSIDE = ["../x.png", "a/../../x.png", "/etc/x.png", "a\\..\\x.png", "C:/x.png", "../folder/"]
KINDS = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]


@pytest.mark.parametrize(
    ("suffix", "name", "kind"),
    [
        *(("zip", name, b"") for name in OUTSIDE),
        *(("tgz", name, tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE) for name in OUTSIDE),
        *(("tgz", "a/1.png", kind) for kind in KINDS),
    ],
)
def test_an_archive_that_reaches_outside_is_refused(tmp_path, suffix: str, name: str, kind: bytes) -> None:
    path = write_archive(tmp_path / f"x.{suffix}", {**FILES, name: b""})
    if suffix == "tgz":
        with tarfile.open(path, "w:gz") as tar:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    found = "which is a link or another" if kind in KINDS else "a path that points outside"
    with pytest.raises(InputError, match=rf"x.* holds '.*', {found}"):
        contents(path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_archive_that_is_cut_or_damaged_is_refused(tmp_path, suffix: str) -> None:
    path = write_archive(tmp_path / f"x.{suffix}", FILES)
    whole = path.read_bytes()
    ends = {512, 1024, len(whole) // 2}
    if suffix == "tar":  # also between two members, and in a header
        with tarfile.open(path) as tar:
            ends |= {start for member in tar for start in (member.offset, member.offset + 100)} | {tar.offset}
    else:
        ends.add(len(whole) - 4)
    broken = [whole[:end] for end in sorted(ends) if end >= 512]  # of less nobody can say that it was a tar
    if suffix != "tar":  # which has no check sums
        broken += [whole[:8] + b" and no more", whole[:3000] + bytes([whole[3000] ^ 1]) + whole[3001:]]
    for data in broken:
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"cannot open .*x\..*download it again") as caught:
            contents(path)
        assert "\n" not in str(caught.value)


def test_archives_are_read_unless_they_are_extracted(tmp_path) -> None:
    write_archive(tmp_path / "one.zip", {"one/1": b"1"})
    write_archive(tmp_path / "sub/two.tgz", {"two/2": b"2"})
    write_archive(tmp_path / "sub/Img/three.tar", {"three/3": b"3"})
    write_archive(tmp_path / "other.zip", {"other/4": b"4"})
    names = ("one.zip", "two.tgz", "Img/three.tar")
    inner = {name: data for name, data in contents(tmp_path, *names).items() if "." not in name}  # not the archives
    assert inner == {"one/1": b"1", "sub/two/2": b"2", "sub/Img/three/3": b"3"}
    write_files(tmp_path, {"one/1": b"extracted"})
    (tmp_path / "one.zip").write_bytes(b"PK\x03\x04 broken, and not looked at")
    assert contents(tmp_path, *names)["one/1"] == b"extracted"
