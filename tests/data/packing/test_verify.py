"""What a shard may hold that the manifest does not say, in the stream and in ``verify``."""

import gzip
import hashlib
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_obdsd.data import manifest as manifests
from dist_obdsd.data.manifest import Manifest, Shard, key, to_json
from dist_obdsd.data.packing.verify import verify
from dist_obdsd.data.shard_reader import read_shard
from dist_obdsd.data.stream import evaluation_batches
from dist_obdsd.errors import RunError
from tests.data.packing.sources import write, write_archive
from tests.data.pictures import noise
from tests.data.shards import config_of, picture

Members = list[tuple[str, bytes]]


@pytest.fixture
def members() -> Members:
    """What a shard of four classes of four images holds: a class and an image for each sample."""
    samples = [((f"{key(i)}.cls", str(i // 4).encode()), (f"{key(i)}.png", picture(i))) for i in range(16)]
    return [member for sample in samples for member in sample]


def write_shard(folder: Path, members: Members) -> Manifest:
    """Write the members, and a manifest of 16 samples that has the right sums of whatever they are."""
    data = write_archive(folder / "a.tar", members).read_bytes()
    ids, sha256 = tuple(range(16)), hashlib.sha256(data).hexdigest()
    shard = Shard("a.tar", len(data), sha256, ids, tuple(i // 4 for i in ids), ("train",) * 16)
    manifest = Manifest({}, 0, 2, tuple("abcd"), {"train": (shard,)})
    (folder / "manifest.json").write_text(to_json(manifest))
    return manifest


def read(folder: Path) -> list[tuple[int, bytes]]:
    return list(read_shard(str(folder), *manifests.load(folder).splits["train"], range(16)))


def test_a_sound_shard(tmp_path, members: Members) -> None:
    # What is no file, has no suffix or belongs to no sample's image changes nothing.
    for more in (members, [("README", b""), *members, (f"{key(15)}.txt", b"fine")]):
        write_shard(tmp_path, more)
        assert read(tmp_path) == [(i, picture(i)) for i in range(16)]
        assert verify(tmp_path) == []


def check_refused(folder: Path, clause: str) -> None:
    """Find the clause, behind the shard's name, in the stream's error and in a problem of ``verify``."""
    with pytest.raises(RunError, match=rf"a.tar .*{clause}.*`dist-obdsd verify {folder}`"):
        read(folder)
    assert any(re.match(rf"a.tar: .*{clause}", problem) for problem in verify(folder))


def put(members: Members, place: int, *new: tuple[str, bytes]) -> None:
    members[place:place] = new


# Each sample has two members, .cls and .png; what is wrong with sample 3.
FAULTS: dict[str, tuple[Callable[[Members], object], str]] = {
    "interleaved": (lambda m: put(m, 9, m.pop(7)), "sample 00000003.* has no image"),
    "no image": (lambda m: m.pop(7), "sample 00000003.* has no image"),
    "two images": (lambda m: put(m, 8, (f"{key(3)}.gif", noise(0, kind="GIF"))), "sample 00000003.* has 2 images"),
    "no class": (lambda m: m.pop(6), "sample 00000003.* has no class file"),
    "another class": (
        lambda m: put(m, 6, (m.pop(6)[0], b"7")), "sample 00000003.* has class b'7' where the manifest has 0",
    ),
    "member twice": (lambda m: put(m, 8, m[7]), "it has two files 00000003.png"),
    "sample twice": (lambda m: put(m, 10, *m[6:8]), "holds 00000003 where the manifest has 00000005"),
    "no sample": (lambda m: (m.pop(6), m.pop(6)), "holds 00000004 where the manifest has 00000003"),
    "extra sample": (lambda m: put(m, 32, ("00000099.cls", b"0")), "goes on with 00000099 after the 16 samples"),
    "nothing": (lambda m: m.clear(), "ends before sample 00000000, with 0 of 16"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_members_that_are_not_the_manifest_s(tmp_path, members: Members, fault: str) -> None:
    change, clause = FAULTS[fault]
    change(members)
    write_shard(tmp_path, members)
    check_refused(tmp_path, clause)


DAMAGES: dict[str, tuple[Callable[[bytes, int], bytes], str]] = {
    "cut in a header": (lambda data, image: data[: image + 200], "sample 00000003.* has no image"),
    "cut in an image": (lambda data, image: data[: image + 552], "sample 00000003 .*unexpected end of data"),
    "a wrong sum": (
        lambda data, image: data[: image + 150] + b"?" + data[image + 151 :], "sample 00000003.* has no image",
    ),
    "gzip": (lambda data, _: gzip.compress(data), "cannot be read at sample 00000000"),
    "empty": (lambda *_: b"", "sample 00000000"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_tar_that_is_damaged(tmp_path, members: Members, damage: str) -> None:
    write_shard(tmp_path, members)
    data = (tmp_path / "a.tar").read_bytes()
    change, clause = DAMAGES[damage]
    (tmp_path / "a.tar").write_bytes(change(data, data.index(b"00000003.png")))
    check_refused(tmp_path, clause)


def test_nothing_in_a_shard_is_executed(tmp_path, members: Members) -> None:
    trace, config = tmp_path / "ran", config_of(tmp_path, workers=1)
    payload = f"cos\nmkdir\n(V{trace}\ntR.".encode()  # a pickle that makes a folder
    pickle.loads(payload)  # the control
    trace.rmdir()
    suffixes = ("pyd", "pickle", "pth", "npy", "npz", "mp", "ten", "json", "py")
    extra = [(f"{key(i)}.{suffix}", payload) for i in range(16) for suffix in suffixes]
    manifest = write_shard(tmp_path, sorted(members + extra, key=lambda member: member[0].split(".")[0]))
    assert sum(len(batch.ids) for batch in evaluation_batches(manifest, "train", config, 0, 1)) == 16
    assert len(read(tmp_path)) == 16
    assert verify(tmp_path) == []
    # Nor is it where an image or a class should be.
    for place, words in (("00000003.png", "cannot be decoded"), ("00000003.cls", "has class b'")):
        bad = write_shard(tmp_path, [(name, payload if name == place else data) for name, data in members])
        with pytest.raises(RunError, match=rf"sample 00000003.* {words}"):
            list(evaluation_batches(bad, "train", config, 0, 1))
    assert not trace.exists()


def test_a_flipped_bit_is_found_with_shard_and_key(tmp_path, members: Members, caplog) -> None:
    write_shard(tmp_path, members)
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[data.index(b"IDAT", data.index(b"00000007.png")) + 20] ^= 0xFF
    (tmp_path / "a.tar").write_bytes(data)
    problems = verify(tmp_path)
    assert [record.getMessage() for record in caplog.records] == problems
    assert len(problems) == 2
    assert problems[0].startswith("a.tar: has SHA-256")
    assert problems[1].startswith("a.tar: sample 00000007 has an image that cannot")


def test_cut_missing_and_stray_shards_are_found(tmp_path, shards: Path) -> None:
    folder = Path(shutil.copytree(shards, tmp_path / "shards"))
    assert verify(folder, workers=2) == []
    first, second, *_ = manifests.load(folder).splits["train"]
    data = (folder / first.file).read_bytes()
    (folder / first.file).write_bytes(data[:2500])
    (folder / second.file).unlink()
    write(folder / "train-000099.tar", data)
    problems = verify(folder, workers=2)
    assert problems[0] == f"{first.file}: has 2500 bytes but the manifest says {first.bytes}"
    assert problems[-2:] == [
        f"{second.file}: is missing",
        "train-000099.tar: is not in the manifest; remove it or pack again",
    ]
