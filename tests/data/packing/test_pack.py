import hashlib
import io
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dist_obdsd.data import manifest
from dist_obdsd.data.packing import pack as packing
from dist_obdsd.data.packing import shard_assignment as assignment
from dist_obdsd.data.packing.pack import pack
from dist_obdsd.data.packing.recipes import Recipe
from dist_obdsd.data.packing.verify import verify
from dist_obdsd.data.shard_reader import image_names
from dist_obdsd.errors import InputError, RunError, UserError
from tests.data.packing.sources import FOLDER, image, write, write_files
from tests.data.pictures import noise


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Six training classes of 9 images and three test classes of 5, every other image a JPEG."""
    stems = [f"train/{name}/{i}" for name in "abcdef" for i in range(9)]
    stems += [f"test/{name}/{i}" for name in "xyz" for i in range(5)]
    pngs = {f"{stem}.png": noise(n) for n, stem in enumerate(stems) if int(stem[-1]) % 2 == 0}
    jpegs = {f"{stem}.jpeg": noise(n, "JPEG") for n, stem in enumerate(stems) if int(stem[-1]) % 2}
    return write_files(tmp_path / "source", pngs | jpegs)


def samples_of(path: Path) -> list[dict[str, bytes]]:
    """The samples as webdataset reads them."""
    return list(webdataset.tariterators.tarfile_samples([{"url": str(path)}]))


def test_every_image_is_copied_byte_for_byte_with_its_class(source, tmp_path) -> None:
    out = tmp_path / "deep" / "out"
    packed = pack(FOLDER, source, out)
    assert (packed, packed.digest) == (manifest.load(out), manifest.load(out).digest)
    assert "left_out" not in packed.recipe
    assert (packed.images("train"), packed.images("test")) == (54, 15)
    defaults = {"archives": [], "splits": {}, "depth": 1, "test_fraction": 0.5, "split_seed": 0}
    assert packed.recipe["options"] == defaults
    seen = set()
    for shard in packed.shards():
        samples = samples_of(out / shard.file)
        assert [s["__key__"] for s in samples] == [manifest.key(i) for i in shard.ids]
        for sample, i, class_id, role in zip(samples, shard.ids, shard.classes, shard.roles, strict=True):
            about = json.loads(sample["json"])
            original = source / about["name"]
            assert sample["jpg" if original.suffix == ".jpeg" else "png"] == original.read_bytes()
            assert (about["id"], about["class"], int(sample["cls"])) == (i, class_id, class_id)
            assert packed.classes[class_id] == original.parent.name
            assert role == ("train" if about["name"].startswith("train/") else "both")
            seen.add(about["name"])
        data = (out / shard.file).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)
    assert len(seen) == 69
    assert set(image_names(str(out), packed.shards()).values()) == seen
    assert image_names(f"pipe:cat {out}/{{file}}", packed.shards(), [7]).keys() == {7}
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]
    assert verify(out) == []


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_packing_twice_gives_the_same_bytes(source, tmp_path) -> None:
    pack(FOLDER, source, tmp_path / "one")
    time.sleep(1.1)  # a time stamp in a tar counts seconds
    pack(FOLDER, source, tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    archive = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", source))
    for workers, origin in ((1, source), (3, archive)):
        pack(FOLDER, origin, tmp_path / f"small {workers}", resize=5, workers=workers)
    assert contents(tmp_path / "small 1") == contents(tmp_path / "small 3") != contents(tmp_path / "one")
    pack(FOLDER, source, tmp_path / "three", seed=1)
    assert contents(tmp_path / "one") != contents(tmp_path / "three")


def test_unusable_images_and_lonely_classes_are_left_out(source, tmp_path, caplog) -> None:
    flipped = bytearray(noise(2))
    flipped[len(flipped) // 2] ^= 0xFF
    broken = {"train/a/0.png": b"no image", "train/a/1.jpeg": noise(1, "JPEG")[:400], "test/x/0.png": bytes(flipped)}
    write_files(source, broken | {"train/lonely/0.png": noise(3)})
    (source / "train/b/broken.png").symlink_to("nowhere")
    packed = pack(FOLDER, source, tmp_path / "out")
    names = {*broken, "train/b/broken.png"}
    *images, lonely = packed.recipe["left_out"]
    assert {entry["name"] for entry in images} == names
    assert lonely == {"class": "lonely", "reason": "1 usable images, fewer than 2 samples per class"}
    assert all(name in caplog.text for name in {*names, "lonely"})
    assert (packed.images("train"), packed.images("test"), "lonely" in packed.classes) == (52, 14, False)
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("names", "fact"),
    [
        (["a/0", "a/1", "b/0", "b/1", "c/0", "c/1"], r"has 1 training classes .* \(2 others .* options.test_fraction"),
        (["train/a/0", "train/b/0", "test/c/0"], "has 0 training classes with 2 usable images or more; training nee"),
        ([], "has 0 training classes"),
        (["train/a/0", "train/a/1", "train/b/0", "test/a/0"], "in training and in test, such as 'a'"),
    ],
)
def test_classes_that_cannot_be_used_are_refused(tmp_path, names: list[str], fact: str) -> None:
    (tmp_path / "source").mkdir()
    write_files(tmp_path / "source", {f"{name}.png": image(n) for n, name in enumerate(names)})
    with pytest.raises(InputError, match=fact):
        pack(FOLDER, tmp_path / "source", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_other_counts_than_the_recipes_need_allow_partial(source, tmp_path, caplog) -> None:
    queries = {"query": {"images": 1, "classes": 1}}
    expected = {"train": {"images": 54, "classes": 6}, "test": {"images": 15, "classes": 3, "roles": queries}}
    recipe = Recipe(name="mine", reader="folder", description="", expected=expected)
    clause = "test (query) has 0 images of 0 classes but the recipe mine expects 1 of 1"
    with pytest.raises(InputError, match=re.escape(clause)):
        pack(recipe, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    packed = pack(recipe, source, tmp_path / "out", allow_partial=True)
    assert packed.recipe["partial"] is True
    assert packed.recipe["differences"] == [clause]
    assert len(caplog.records) == 1
    del expected["test"]["roles"]
    whole = Recipe(name="mine", reader="folder", description="", expected=expected)
    assert "partial" not in pack(whole, source, tmp_path / "whole").recipe


def test_larger_images_are_reduced_and_others_left_alone(tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    images = {  # and the suffix and size of each in its shard
        "a/0.jpg": (noise(0, "JPEG", (80, 40), exif=exif), "jpg", (20, 40)),
        "a/1.png": (noise(1, size=(20, 90)), "png", (20, 90)),
        "b/0.webp": (noise(2, "WEBP", (60, 60)), "webp", (20, 20)),
        "b/1.bmp": (noise(3, "BMP", (64, 32)), "png", (40, 20)),
    }
    source = write_files(tmp_path / "source", {f"train/{name}": data for name, (data, _, _) in images.items()})
    packed = pack(FOLDER, source, tmp_path / "out", resize=20)
    assert packed.recipe["resize"] == 20
    assert list(packed.splits) == ["train"]
    for sample in samples_of(tmp_path / "out" / packed.splits["train"][0].file):
        name = json.loads(sample["json"])["name"].removeprefix("train/")
        data, suffix, size = images.pop(name)
        found = Image.open(io.BytesIO(sample[suffix]))
        assert found.size == size
        assert not found.getexif()
        assert (sample[suffix] == data) == (name == "a/1.png")
    assert not images
    assert verify(tmp_path / "out") == []


def test_an_existing_target_is_not_touched(source, tmp_path) -> None:
    out = tmp_path / "out"
    pack(FOLDER, source, out)
    before = contents(out)
    with pytest.raises(InputError, match="is already packed; remove it or choose another --out"):
        pack(FOLDER, source, out, seed=1)
    assert contents(out) == before
    pack(FOLDER, source, out, seed=1, overwrite=True)
    assert contents(out) != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    write(out / "thesis.txt", b"dear")
    for fact in ("also holds thesis.txt, which is no shard", "is not empty and holds no shards"):
        with pytest.raises(InputError, match=fact):
            pack(FOLDER, source, out, overwrite=True)
        (out / "manifest.json").unlink(missing_ok=True)


def test_the_processes_of_a_killed_run_end_with_it(source, tmp_path, monkeypatch) -> None:
    context = multiprocessing.get_context("fork")
    reached = context.Event()
    monkeypatch.setattr(packing, "examine", lambda *args: reached.set() or time.sleep(600))
    process = context.Process(target=pack, args=(FOLDER, source, tmp_path / "out"), kwargs={"workers": 2})
    process.start()
    try:
        assert reached.wait(120)
        children = psutil.Process(process.pid).children()
        assert len(children) == 2
        opened = [os.readlink(file) for child in children for file in Path(f"/proc/{child.pid}/fd").iterdir()]
        assert not any(name.endswith("out.writing") for name in opened)  # the lock is on the folder
    finally:
        process.kill()
        process.join()
    assert psutil.wait_procs(children, timeout=60)[1] == []
    monkeypatch.undo()
    pack(FOLDER, source, tmp_path / "out")
    assert verify(tmp_path / "out") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


@pytest.mark.parametrize("suffix", ["", "zip", "tar"])
def test_a_file_that_cannot_grow_is_one_sentence(source, tmp_path, suffix: str) -> None:
    # The limit on a file's size stands in for a full disk: the same write fails in the same place.
    origin = source
    if suffix:
        write(source / "large.txt", bytes(9000))
        origin = Path(shutil.make_archive(str(source / "all"), suffix, source))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(RunError, match=r"packing to .*out stopped.*: File too large; nothing was kept"):
            pack(FOLDER, origin, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def stop(*args: object) -> None:
    raise KeyboardInterrupt


def be_killed(*args: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("happens", "workers", "error", "fact"),
    [
        (stop, 1, KeyboardInterrupt, None),
        (be_killed, 2, RunError, "a process that decodes images was killed; if memory ran out, lower --workers"),
    ],
)
def test_an_interruption_leaves_nothing(source, tmp_path, monkeypatch, happens, workers, error, fact) -> None:
    monkeypatch.setattr(packing, "examine", happens)
    with pytest.raises(error, match=fact):
        pack(FOLDER, source, tmp_path / "out", workers=workers)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("out", "how", "words"),
    [
        ("file/out", {}, "Not a directory"),
        ("file", {}, "is a file"),
        ("source/out", {}, "lies inside the source"),
        ("out", {"samples_per_class": 1}, "samples per class is 1"),
        ("out", {"resize": 0}, "resize is 0"),
    ],
)
def test_a_target_or_size_that_cannot_be_is_one_sentence(source, tmp_path, out, how, words) -> None:
    write(tmp_path / "file", b"")
    with pytest.raises(UserError, match=words):
        pack(FOLDER, source, tmp_path / out, **how)


# ---- which images go into which shard ----


@given(images=st.integers(2, 3000), k=st.integers(2, 20))
def test_blocks_are_near_equal_and_lose_no_group(images: int, k: int) -> None:
    images = max(images, k)
    sizes = assignment.cut_blocks(images, k)
    assert sum(sizes) == images
    assert min(sizes) >= k
    assert max(sizes) - min(sizes) <= k
    assert max(sizes) < max(assignment.BLOCK, k) + k
    assert sum(size // k for size in sizes) == images // k
    # Multiples of K but for the remainder.
    assert sum(size % k for size in sizes) == images % k


@given(units=st.integers(1, 10**6), size=st.integers(0, 10**12), fewest=st.integers(1, 64))
def test_shards_are_a_multiple_of_64_or_a_power_of_two(units: int, size: int, fewest: int) -> None:
    count = assignment.shard_count(units, size, fewest)
    assert count == 1 or units // count >= fewest
    if units >= 64 * fewest:
        assert count % 64 == 0
        assert count == 64 or size / count >= assignment.SHARD_BYTES
    else:
        assert count & (count - 1) == 0
        assert units < 2 * count * fewest  # twice as many would have too few each


@settings(deadline=None, max_examples=60)
@given(sizes=st.lists(st.integers(2, 60), min_size=2, max_size=40), k=st.integers(2, 5), seed=st.integers(0, 99))
def test_training_shards_have_equal_group_counts(sizes: list[int], k: int, seed: int) -> None:
    members, start = {}, 0
    for class_id, size in enumerate(max(size, k) for size in sizes):
        members[class_id] = list(range(start, start + size))
        start += size
    class_of = {i: class_id for class_id, ids in members.items() for i in ids}
    groups = sum(len(ids) // k for ids in members.values())
    shards = assignment.shard_count(groups, 0, assignment.FEWEST_GROUPS)
    assigned = assignment.assign_training(members, k, shards, seed)
    assert len(assigned) == shards
    assert sorted(i for shard in assigned for i in shard) == list(range(start))
    counts = []
    for shard in assigned:
        present = Counter(class_of[i] for i in shard)
        assert min(present.values()) >= k
        counts.append(sum(n // k for n in present.values()))
    # Two blocks of one class may meet in a shard and make one group more of their remainders.
    assert max(counts) - min(counts) <= 1 + sum(counts) - groups
    assert assigned == assignment.assign_training(members, k, shards, seed)


def test_test_images_are_shared_out_evenly() -> None:
    assert sorted(map(len, assignment.assign_evenly(range(100), 8, 0, "test"))) == [12] * 4 + [13] * 4
