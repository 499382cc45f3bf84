"""What a shard may hold that the manifest does not say, in the stream and in ``verify``."""

import gzip
import hashlib
import io
import os
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from dist_obdsd.data.manifest import Manifest, Shard, key, to_json
from dist_obdsd.data.packing.verify import verify
from dist_obdsd.data.shard_reader import read_shard
from dist_obdsd.data.stream import TrainStream, evaluation_batches
from dist_obdsd.errors import RunError
from tests.data.test_stream import config_of, picture

Members = list[tuple[str, bytes]]


@dataclass(frozen=True)
class Packed:
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


def tar_of(members: Members) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def pack_again(folder: Path, members: Members) -> Packed:
    """Write the members, and a manifest that has the right sums of whatever they are."""
    data = tar_of(members)
    ids = tuple(range(16))
    shard = Shard(
        "a.tar", len(data), hashlib.sha256(data).hexdigest(), ids, tuple(i // 4 for i in ids), ("train",) * 16
    )
    manifest = Manifest({}, 0, 2, tuple("abcd"), {"train": (shard,)})
    (folder / "a.tar").write_bytes(data)
    (folder / "manifest.json").write_text(to_json(manifest))
    return Packed(folder, manifest, members)


@pytest.fixture
def packed(tmp_path: Path) -> Packed:
    members = []
    for i in range(16):
        members += [(f"{key(i)}.cls", str(i // 4).encode()), (f"{key(i)}.png", picture(i))]
    return pack_again(tmp_path, members)


def read(packed: Packed) -> list[tuple[int, bytes]]:
    return list(read_shard(str(packed.folder), packed.shard, range(16)))


def problems_of(packed: Packed) -> list[str]:
    return [p for p in verify(packed.folder).problems if "SHA-256" not in p and "bytes but" not in p]


def test_a_sound_shard(packed: Packed) -> None:
    assert read(packed) == [(i, picture(i)) for i in range(16)]
    assert verify(packed.folder).problems == []
    # What is no file, has no suffix or belongs to no sample's image changes nothing.
    more = pack_again(packed.folder, [("README", b""), *packed.members, (f"{key(15)}.txt", b"fine")])
    assert read(more) == read(packed)
    assert verify(packed.folder).problems == []


def move(members: Members, start: int, to: int) -> None:
    members.insert(to, members.pop(start))


def put(members: Members, place: int, *new: tuple[str, bytes]) -> None:
    members[place:place] = new


FAULTS: dict[str, tuple[Callable[[Members], object], str, str]] = {
    "interleaved": (
        lambda m: move(m, 7, 9),
        "sample 00000003 of shard .*a.tar has no image",
        "key 00000003 has 0 images",
    ),
    "split in two": (
        lambda m: move(m, 7, 11),
        "sample 00000003 of shard .*a.tar has no image",
        "key 00000003 has 0 images",
    ),
    "member twice": (
        lambda m: put(m, 8, m[7]),
        r"a.tar cannot be read at sample 00000003 \(00000003.png: duplicate file name in tar file",
        "is broken at sample 3, key 00000003: 00000003.png: duplicate file name",
    ),
    "sample twice": (
        lambda m: put(m, 10, *m[6:8]),
        "a.tar holds 00000003 where the manifest has 00000005",
        "key 00000003 stands at sample 5 where the manifest has key 00000005",
    ),
    "no image": (lambda m: m.pop(7), "sample 00000003 .* has no image", "key 00000003 has 0 images"),
    "no class": (lambda m: m.pop(6), "sample 00000003 .* has no class file", "key 00000003 has no .cls"),
    "no sample": (
        lambda m: (m.pop(6), m.pop(6)),
        "a.tar holds 00000004 where the manifest has 00000003",
        "key 00000004 stands at sample 3",
    ),
    "extra sample": (
        lambda m: put(m, 32, ("00000099.png", b""), ("00000099.cls", b"0")),
        "a.tar goes on with 00000099 after the 16 samples",
        "key 00000099 stands after",
    ),
    "nothing": (lambda m: m.clear(), "a.tar ends before sample 00000000, with 0 of 16", "the tar ends at sample 0"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_members_that_are_not_the_manifest_s(packed: Packed, fault: str) -> None:
    change, in_stream, in_verify = FAULTS[fault]
    change(packed.members)
    packed = pack_again(packed.folder, packed.members)
    with pytest.raises(RunError, match=in_stream):
        read(packed)
    (problem, *_) = problems_of(packed)
    assert problem.startswith(f"a.tar: {in_verify}")


@pytest.mark.parametrize("inside", ["header", "data", "padding"])
def test_a_tar_that_is_cut(packed: Packed, inside: str) -> None:
    data = packed.path.read_bytes()
    header = data.index(b"00000003.png")
    cut = {"header": header + 200, "data": header + 512 + 40, "padding": header + 512 + len(picture(3)) + 3}[inside]
    packed.path.write_bytes(data[:cut])
    said = {"header": "has no image", "data": "unexpected end of data", "padding": "unexpected end of data"}[inside]
    with pytest.raises(RunError, match=said) as caught:
        read(packed)
    assert "sample 00000003" in str(caught.value)
    assert "a.tar" in str(caught.value)
    assert "key 00000003" in problems_of(packed)[0]


def test_a_header_that_is_damaged(packed: Packed) -> None:
    data = bytearray(packed.path.read_bytes())
    data[data.index(b"00000003.cls") + 150] ^= 0x55  # its check sum
    packed.path.write_bytes(data)
    with pytest.raises(RunError, match="a.tar ends before sample 00000003, with 3 of 16"):
        read(packed)
    assert problems_of(packed) == ["a.tar: the tar ends at sample 3 where the manifest has key 00000003"]


def test_bytes_after_the_end(packed: Packed) -> None:
    """They are not read; ``verify`` tells by the sums."""
    with packed.path.open("ab") as file:
        file.write(b"garbage" * 1000)
    assert len(read(packed)) == 16
    assert len(verify(packed.folder).problems) == 1


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_a_compressed_tar(packed: Packed, kind: str) -> None:
    data = packed.path.read_bytes()
    if kind == "gz":
        packed.path.write_bytes(gzip.compress(data))
    else:
        with tarfile.open(packed.path, f"w:{kind}") as tar:
            tar.addfile(tarfile.TarInfo("x"))
    with pytest.raises(RunError, match=r"a.tar cannot be read at sample 00000000 \(it is compressed, and shards are"):
        read(packed)
    assert problems_of(packed) == [
        "a.tar: is broken at sample 0, key 00000000: it is compressed, and shards are plain tars"
    ]


def test_what_is_no_tar(packed: Packed) -> None:
    for data in (b"", b"<html>not found</html>" * 100, os.urandom(5000)):
        packed.path.write_bytes(data)
        with pytest.raises(RunError, match=r"a.tar (cannot be read at|ends before) sample 00000000"):
            read(packed)
        assert "key 00000000" in problems_of(packed)[0]


def test_a_link_is_no_image(packed: Packed) -> None:
    """A link in a tar is never followed, wherever it points."""
    (packed.folder / "secret").write_bytes(picture(3))
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, data in packed.members:
            info = tarfile.TarInfo(name)
            if name == "00000003.png":
                info.type, info.linkname = tarfile.SYMTYPE, str(packed.folder / "secret")
                tar.addfile(info)
            else:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    packed.path.write_bytes(stream.getvalue())
    with pytest.raises(RunError, match="sample 00000003 .* has no image"):
        read(packed)


class Payload:
    """What makes a file when it is unpickled."""

    def __init__(self, trace: str) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.trace,)


def test_nothing_in_a_shard_is_executed(packed: Packed, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    payload = pickle.dumps(Payload(str(trace)))
    program = f"import os; os.mkdir({str(trace)!r})".encode()
    pickle.loads(payload)  # the control: it works
    trace.rmdir()
    suffixes = ("pyd", "pickle", "pkl", "pth", "pt", "npy", "npz", "mp", "msg", "ten", "tb", "json")
    members: Members = []
    for place in range(0, 32, 2):
        name = packed.members[place][0].removesuffix(".cls")
        members += packed.members[place : place + 2]
        members += [(f"{name}.{suffix}", payload) for suffix in suffixes] + [(f"{name}.py", program)]
    members += [(f"__{name}__", payload) for name in ("init", "main")]
    packed = pack_again(packed.folder, members)
    config = config_of(packed.folder, lanes=1, workers=1).model_copy(
        update={"batch": config_of(packed.folder).batch.model_copy(update={"global_size": 8})}
    )
    source = TrainStream(packed.manifest, [0, 1, 2, 3], config, 0, 1)
    try:
        assert len(list(source)) == 4
    finally:
        source.close()
    assert sum(len(batch.ids) for batch in evaluation_batches(packed.manifest, "train", config, 0, 1)) == 16
    assert all("has a .json that cannot be used" in problem for problem in verify(packed.folder).problems)
    assert not trace.exists()
    # Nor is it where an image or a class should be.
    bad = [(name, payload if name == "00000003.png" else data) for name, data in packed.members]
    with pytest.raises(RunError, match=r"sample 00000003 .* cannot be decoded"):
        list(evaluation_batches(pack_again(packed.folder, bad).manifest, "train", config, 0, 1))
    bad = [(name, payload if name == "00000003.cls" else data) for name, data in packed.members]
    with pytest.raises(RunError, match=r"sample 00000003 .* has class b'"):
        read(pack_again(packed.folder, bad))
    assert not trace.exists()
