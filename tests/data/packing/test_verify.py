"""What a shard may hold that the manifest does not say, in the stream and in ``verify``."""

import gzip
import hashlib
import os
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from dist_obdsd.data import manifest as manifests
from dist_obdsd.data.manifest import Manifest, Shard, key, to_json
from dist_obdsd.data.packing.verify import verify
from dist_obdsd.data.shard_reader import read_shard
from dist_obdsd.data.stream import evaluation_batches
from dist_obdsd.errors import RunError
from tests.data.packing.readers.layouts import write_archive
from tests.data.packing.sources import write
from tests.data.pictures import noise
from tests.data.shards import config_of, picture

Members = list[tuple[str, bytes]]


@dataclass(frozen=True)
class OneShard:
    """Four classes of four images in one shard."""

    folder: Path
    manifest: Manifest
    members: Members

    @property
    def shard(self) -> Shard:
        return self.manifest.splits["train"][0]

    @property
    def path(self) -> Path:
        return self.folder / self.shard.file


def pack_again(folder: Path, members: Members) -> OneShard:
    """Write the members, and a manifest that has the right sums of whatever they are."""
    data = write_archive(folder / "a.tar", members).read_bytes()
    ids = tuple(range(16))
    shard = Shard(
        "a.tar", len(data), hashlib.sha256(data).hexdigest(), ids, tuple(i // 4 for i in ids), ("train",) * 16
    )
    manifest = Manifest({}, 0, 2, tuple("abcd"), {"train": (shard,)})
    (folder / "manifest.json").write_text(to_json(manifest))
    return OneShard(folder, manifest, members)


@pytest.fixture
def one(tmp_path: Path) -> OneShard:
    members = []
    for i in range(16):
        members += [(f"{key(i)}.cls", str(i // 4).encode()), (f"{key(i)}.png", picture(i))]
    return pack_again(tmp_path, members)


def read(one: OneShard) -> list[tuple[int, bytes]]:
    return list(read_shard(str(one.folder), one.shard, range(16)))


def problems_of(one: OneShard) -> list[str]:
    return [p for p in verify(one.folder) if "SHA-256" not in p and "bytes but" not in p]


def test_a_sound_shard(one: OneShard) -> None:
    assert read(one) == [(i, picture(i)) for i in range(16)]
    assert verify(one.folder) == []
    # What is no file, has no suffix or belongs to no sample's image changes nothing.
    more = pack_again(one.folder, [("README", b""), *one.members, (f"{key(15)}.txt", b"fine")])
    assert read(more) == read(one)
    assert verify(one.folder) == []


def put(members: Members, place: int, *new: tuple[str, bytes]) -> None:
    members[place:place] = new


# Each sample has two members, .cls and .png. What is wrong with sample 3, alike in the stream and in ``verify``.
FAULTS: dict[str, tuple[Callable[[Members], object], str]] = {
    "interleaved": (lambda m: put(m, 9, m.pop(7)), "has no image"),
    "no image": (lambda m: m.pop(7), "has no image"),
    "two images": (lambda m: put(m, 8, (f"{key(3)}.gif", noise(0, kind="GIF"))), "has 2 images"),
    "no class": (lambda m: m.pop(6), "has no class file"),
    "another class": (lambda m: put(m, 6, (m.pop(6)[0], b"7")), "has class b'7' where the manifest has 0"),
    "member twice": (lambda m: put(m, 8, m[7]), "it has two files 00000003.png"),
    "sample twice": (lambda m: put(m, 10, *m[6:8]), "holds 00000003 where the manifest has 00000005"),
    "no sample": (lambda m: (m.pop(6), m.pop(6)), "holds 00000004 where the manifest has 00000003"),
    "extra sample": (lambda m: put(m, 32, ("00000099.cls", b"0")), "goes on with 00000099 after the 16 samples"),
    "nothing": (lambda m: m.clear(), "ends before sample 00000000, with 0 of 16"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_members_that_are_not_the_manifest_s(one: OneShard, fault: str) -> None:
    change, clause = FAULTS[fault]
    change(one.members)
    one = pack_again(one.folder, one.members)
    with pytest.raises(RunError) as caught:
        read(one)
    (problem, *_) = problems_of(one)
    about_sample = clause.startswith("has")
    for text in (str(caught.value), problem):
        assert clause in text
        assert "a.tar" in text
        assert not about_sample or "sample 00000003" in text


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
def test_a_tar_that_is_damaged(one: OneShard, damage: str) -> None:
    data = one.path.read_bytes()
    change, clause = DAMAGES[damage]
    one.path.write_bytes(change(data, data.index(b"00000003.png")))
    with pytest.raises(RunError, match=clause):
        read(one)
    assert re.search(clause, problems_of(one)[0])


class Payload:
    """What makes a file when it is unpickled."""

    def __init__(self, trace: str) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.trace,)


def test_nothing_in_a_shard_is_executed(one: OneShard, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    payload = pickle.dumps(Payload(str(trace)))
    pickle.loads(payload)  # the control: it works
    trace.rmdir()
    names = [name.removesuffix(".cls") for name, _ in one.members[::2]]
    suffixes = ("pyd", "pickle", "pth", "npy", "npz", "mp", "ten", "json", "py")
    extra = [(f"{name}.{suffix}", payload) for name in names for suffix in suffixes]
    order = {name: n for n, name in enumerate(names)}
    whole = pack_again(one.folder, sorted([*one.members, *extra], key=lambda member: order[member[0].split(".")[0]]))
    config = config_of(one.folder, workers=1)
    assert sum(len(batch.ids) for batch in evaluation_batches(whole.manifest, "train", config, 0, 1)) == 16
    assert len(read(whole)) == 16
    assert verify(one.folder) == []
    # Nor is it where an image or a class should be.
    for place, words in (("00000003.png", "cannot be decoded"), ("00000003.cls", "has class b'")):
        bad = pack_again(one.folder, [(name, payload if name == place else data) for name, data in one.members])
        with pytest.raises(RunError, match=rf"sample 00000003.* {words}"):
            list(evaluation_batches(bad.manifest, "train", config, 0, 1))
    assert not trace.exists()


def test_a_flipped_bit_is_found_with_shard_and_key(packed: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert verify(packed, workers=2) == []
    shard = manifests.load(packed).splits["train"][2]
    data = bytearray((packed / shard.file).read_bytes())
    place = data.index(b"IDAT") + 20
    data[place] ^= 0xFF
    (packed / shard.file).write_bytes(data)
    problems = verify(packed)
    assert [record.getMessage() for record in caplog.records] == problems
    assert len(problems) == 2
    assert problems[0].startswith(f"{shard.file}: has SHA-256")
    sample = bytes(data[:place]).rindex(b".png") - 8
    assert problems[1].startswith(f"{shard.file}: sample {data[sample : sample + 8].decode()} has an image that cannot")


def test_truncated_missing_and_stray_shards_are_found(packed: Path) -> None:
    first, second, *_ = manifests.load(packed).splits["train"]
    data = (packed / first.file).read_bytes()
    (packed / first.file).write_bytes(data[:2500])
    (packed / second.file).unlink()
    write(packed / "train-000099.tar", data)
    problems = verify(packed)
    assert problems[0] == f"{first.file}: has 2500 bytes but the manifest says {first.bytes}"
    assert problems[1].startswith(f"{first.file}: cannot be read at sample {key(first.ids[0])}")
    assert problems[2:] == [
        f"{second.file}: is missing",
        "train-000099.tar: is not in the manifest; remove it or pack again",
    ]
