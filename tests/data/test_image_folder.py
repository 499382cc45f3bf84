"""Folders as people have them, for ``embed`` and, where it reads them alike, for ``pack``."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest

from dist_obdsd.data import manifest as manifests
from dist_obdsd.data.image_folder import find_images, folder_batches
from dist_obdsd.data.packing.pack import pack
from dist_obdsd.data.packing.recipes import load_recipe
from dist_obdsd.data.packing.verify import verify
from dist_obdsd.data.shard_reader import image_names
from dist_obdsd.errors import InputError, RunError
from dist_obdsd.files import readable_name
from tests.data.packing.sources import FOLDER, write, write_files
from tests.data.pictures import noise
from tests.data.shards import config_of


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four classes of four images."""
    return write_files(tmp_path / "photos", {f"{'abcd'[n // 4]}/{n}.png": noise(n) for n in range(16)})


def packed_names(source: Path, out: Path) -> list[str]:
    packed = pack(FOLDER, source, out)
    assert verify(out) == []
    return sorted(image_names(str(out), packed.shards()).values())


def embedded(photos: Path, world: int, workers: int, broken: dict[int, str] | None = None) -> dict[int, np.ndarray]:
    """The pixels of every image that can be read, by id."""
    found, config, images = find_images(photos), config_of(photos, workers=workers, batch_size=4), {}
    for batch in (batch for rank in range(world) for batch in folder_batches(found, config, rank, world, broken)):
        images |= {i: batch.images[n].numpy().copy() for n, i in enumerate(batch.ids.tolist())}
        assert (batch.images[len(batch.ids) :] == 0).all()
    return images


def test_links_are_followed_but_not_in_circles(photos: Path, tmp_path: Path) -> None:
    write_files(tmp_path / "elsewhere", {"20.png": noise(20), "21.png": noise(21)})
    (photos / "e").symlink_to(tmp_path / "elsewhere")
    (photos / "a" / "link.png").symlink_to(tmp_path / "elsewhere" / "20.png")
    (photos / "b" / "again").symlink_to(photos)
    (photos / "c" / "gone.jpg").symlink_to(tmp_path / "nothing")
    (photos / "c" / "round").symlink_to(photos / "c" / "round")
    found = find_images(photos)
    assert {"e/20.png", "e/21.png", "a/link.png", "a/0.png", "c/gone.jpg"} < set(found.paths)
    assert len(found.paths) == 16 + 4  # one of them again below b/again would be another 20
    with pytest.raises(RunError, match=r"c/gone.jpg cannot be read: No such file"):
        embedded(photos, 1, 0)
    (photos / "b" / "again").unlink()
    assert packed_names(photos, tmp_path / "out") == sorted(set(found.paths) - {"c/gone.jpg"})


def test_a_folder_that_cannot_be_read_is_an_error(photos: Path, tmp_path: Path, monkeypatch) -> None:
    scandir = os.scandir

    def refuse(path: object) -> object:
        if str(path).endswith("photos/c"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for read in (lambda: find_images(photos), lambda: pack(FOLDER, photos, tmp_path / "out")):
        with pytest.raises(InputError, match=r"photos/c: Permission denied"):
            read()


def test_the_content_says_what_is_an_image(photos: Path, tmp_path: Path, caplog) -> None:
    kinds = {"x.jfif": "JPEG", "x.jpe": "JPEG", "IMG_7": "PNG", "scan.dat": "TIFF", "y.WebP_": "WEBP"}
    write_files(photos / "a", {name: noise(7, kind) for name, kind in kinds.items()})
    write_files(photos / "z", {f"{n}.jpe": noise(n, "JPEG") for n in (8, 9)})  # a class that would vanish
    write_files(photos / "b", dict.fromkeys(("a.txt", "b.txt", "Thumbs.db", "LICENSE"), b"text"))
    write_files(photos / "b", {"BMW.csv": b"BMW,1\n", "P5.md": b"P5 is\n", "empty": b""})
    os.mkfifo(photos / "b" / "pipe")
    with caplog.at_level(logging.INFO):
        found = find_images(photos)
    assert len(found.paths) == 16 + 7
    assert "left out 8 files that hold no image: 3 without a suffix, 2 .txt, 1 .csv" in caplog.text
    assert packed_names(photos, tmp_path / "out") == found.paths


@pytest.mark.parametrize("name", [b"caf\xe9", "Größe €".encode(), b"new\nline", b"a\\b"])
def test_names_of_any_bytes(photos: Path, tmp_path: Path, name: bytes) -> None:
    for n, path in enumerate((b"%s/1.png" % name, b"%s/2.png" % name, b"a/%s.png" % name)):
        write(photos / os.fsdecode(path), noise(30 + n))
    found = find_images(photos)
    assert len(found.paths) == 19
    "\0".join(found.paths).encode()  # can be written anywhere
    assert len(embedded(photos, 1, 0)) == 19
    assert packed_names(photos, tmp_path / "out") == found.paths
    manifest = manifests.load(tmp_path / "out")
    assert readable_name(os.fsdecode(name)) in manifest.classes
    # Manifests of earlier versions hold such names as they came from the system.
    old = manifests.to_json(manifest).replace('"a"', r'"caf\udce9"', 1)
    assert all(name.encode() for name in manifests.from_json(old).classes)


@pytest.mark.parametrize(("world", "workers"), [(1, 1), (3, 0)])
def test_broken_images_are_left_out_where_that_is_asked(photos: Path, world: int, workers: int) -> None:
    whole, names = embedded(photos, 1, workers), find_images(photos).paths
    write_files(photos / "a", {"0.png": b"no image", "1.png": noise(1)[:90]})
    no_files = [f"{'abcd'[n // 4]}/{n}.png" for n in range(4, 10)]  # so that one batch has none that can be read
    for name in no_files:
        (photos / name).unlink()
        os.mkfifo(photos / name)
    (photos / no_files[0]).unlink()
    (photos / no_files[0]).symlink_to("/dev/zero")
    with pytest.raises(RunError, match=r"a/0.png cannot be decoded: .* --skip-broken"):
        embedded(photos, 1, workers)
    broken: dict[int, str] = {}
    found = embedded(photos, world, workers, broken)
    assert {names[i] for i in broken} == {"a/0.png", "a/1.png", *no_files}
    assert {names[i] for i, reason in broken.items() if "no plain file" in reason} == set(no_files)
    assert found.keys() | broken.keys() == whole.keys()
    assert all(np.array_equal(found[i], whole[i]) for i in found)


def test_a_source_may_have_test_images_only(photos: Path, tmp_path: Path) -> None:
    packed = pack(load_recipe("folder", ["options.test_fraction=1"]), photos, tmp_path / "out")
    assert {split: packed.images(split) for split in packed.splits} == {"test": 16}
    assert verify(tmp_path / "out") == []
    with pytest.raises(InputError, match="these shards have only test; training needs a train split"):
        manifests.split_classes(packed, 0)
