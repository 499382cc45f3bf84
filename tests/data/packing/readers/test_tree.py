import os
import resource
import tarfile
from contextlib import ExitStack
from pathlib import Path

import pytest

from dist_obdsd.data.packing.sources import Tree
from dist_obdsd.errors import InputError, RunError
from tests.data.packing.readers.layouts import write_archive, write_files

FILES = {"a/1.png": b"one", "a/b/2.png": b"", "3.txt": os.urandom(70_000), "a/long" + "g" * 120 + ".png": b"pax"}


def contents(source: Path, *archives: str) -> dict[str, bytes]:
    with ExitStack() as stack:
        return {file.name: file.read() for file in Tree(source, archives, source.parent, stack).files()}


@pytest.mark.parametrize("suffix", ["zip", "tar", "tgz", "tar.bz2", "tar.xz"])
def test_an_archive_is_read_like_the_folder_it_was_made_from(tmp_path, suffix: str) -> None:
    folder = write_files(tmp_path / "folder", FILES)
    archive = write_archive(tmp_path / f"x.{suffix}", FILES | {"__MACOSX/a/1.png": b"", "a/._1.png": b"", "./4": b"4"})
    write_files(folder, {".hidden/x.png": b"", "a/.x.png": b"", "4": b"4"})
    assert contents(folder) == contents(archive) == FILES | {"4": b"4"}


@pytest.mark.parametrize("suffix", ["zip", "tgz"])
@pytest.mark.parametrize("name", ["../x.png", "a/../../x.png", "/etc/x.png", "a\\..\\x.png", "C:/x.png", "../folder/"])
def test_an_archive_with_a_path_that_points_outside_is_refused(tmp_path, suffix: str, name: str) -> None:
    path = tmp_path / f"x.{suffix}"
    write_archive(path, FILES)
    assert contents(path) == FILES
    if name.endswith("/") and suffix != "zip":
        with tarfile.open(path, "w:gz") as tar:
            folder = tarfile.TarInfo(name)
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
    else:
        write_archive(path, {**FILES, name: b""})
    with pytest.raises(InputError, match=r"x.* holds '.*', a path that points outside"):
        contents(path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        member = tarfile.TarInfo("a/1.png")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(InputError, match=r"x.tar holds 'a/1.png', which is a link"):
        contents(tmp_path / "x.tar")


@pytest.mark.parametrize("suffix", ["zip", "tar", "tgz", "tar.bz2", "tar.xz"])
def test_an_archive_that_is_cut_anywhere_is_refused(tmp_path, suffix: str) -> None:
    path = write_archive(tmp_path / f"x.{suffix}", FILES)
    whole = path.read_bytes()
    ends = {512, 1024, len(whole) // 2}
    if suffix == "tar":  # also between two members, and in a header
        with tarfile.open(path) as tar:
            ends |= {start for member in tar for start in (member.offset, member.offset + 100)} | {tar.offset}
    else:
        ends.add(len(whole) - 4)
    for end in sorted(end for end in ends if end >= 512):  # of less nobody can say that it was a tar
        path.write_bytes(whole[:end])
        with pytest.raises(InputError, match=r"cannot open .*x\..*download it again"):
            contents(path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("none", None, "none does not exist; give the folder or the archive"),
        ("x.zip", b"PK\x03\x04 and no more", "cannot open .*x.zip: File is not a zip file"),
        ("x.tgz", b"\x1f\x8b and no more", "cannot open .*x.tgz: "),
    ],
)
def test_an_unreadable_source_is_refused(tmp_path, name: str, data: bytes | None, words: str) -> None:
    if data:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=words):
        contents(tmp_path / name)


def test_archives_are_read_unless_they_are_extracted(tmp_path) -> None:
    write_archive(tmp_path / "one.zip", {"one/1": b"1"})
    write_archive(tmp_path / "sub/two.tgz", {"two/2": b"2"})
    write_archive(tmp_path / "sub/Img/three.tar", {"three/3": b"3"})
    write_archive(tmp_path / "other.zip", {"other/4": b"4"})
    names = ("one.zip", "two.tgz", "Img/three.tar")
    found = contents(tmp_path, *names)
    inner = {name: data for name, data in found.items() if name.count(".") == 0}
    assert inner == {"one/1": b"1", "sub/two/2": b"2", "sub/Img/three/3": b"3"}
    write_files(tmp_path, {"one/1": b"extracted"})
    (tmp_path / "one.zip").write_bytes(b"PK\x03\x04 broken, and not looked at")
    assert contents(tmp_path, *names)["one/1"] == b"extracted"


def test_an_archive_is_extracted_only_while_it_is_read(tmp_path) -> None:
    path = write_archive(tmp_path / "x.tgz", FILES)
    with ExitStack() as stack:
        files = Tree(path, (), tmp_path, stack).files()
        assert {file.where for file in files} == {f"{path}/{name}" for name in FILES}
        assert len(list(tmp_path.iterdir())) == 2
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", ["zip", "tar"])
def test_no_room_to_extract_is_one_sentence(tmp_path, suffix: str) -> None:
    path = write_archive(tmp_path / f"x.{suffix}", {"1.png": b"", "2.png": bytes(100_000)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(RunError, match=r"cannot extract .*x\..* temporary folder in .*: File too large; free some"):
            contents(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == [path]
