"""The benchmark of the loader on a few small images: all sources deliver, with true figures."""

import multiprocessing
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import loader
from dist_obdsd.data.packing.pack import pack
from dist_obdsd.data.packing.recipes import load_recipe


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of one colour per class, so that an image tells its class however it was cropped."""
    folder = tmp_path_factory.mktemp("loader")
    for label in range(8):
        (folder / "images" / str(label)).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (20, 16), (25 * label, 0, 0)).save(folder / "images" / str(label) / f"{i}.png")
    recipe = load_recipe("folder").model_copy(update={"options": {"test_fraction": 0}})
    pack(recipe, folder / "images", folder / "shards")
    return folder / "shards"


def test_three_sources_in_one_run(bench, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "SECONDS", 0.05)
    monkeypatch.setattr(loader.tempfile, "tempdir", str(tmp_path))
    rows = bench(loader, "--shards", packed, "--batch", 8, "--workers", 0, "--sizes", "8,24", "--rounds", 1)
    assert [row["source"] for row in rows] == 2 * [loader.STREAM, loader.PIL, loader.CODEC]
    assert [row["image_size"] for row in rows] == [8] * 3 + [24] * 3
    assert all(row["images_per_s"] > 0 <= row["cpu_ms"] for row in rows)  # CPU time comes in ticks of 10 ms
    for stream, pil, codec in (rows[:3], rows[3:]):
        assert stream["of_pil"] == pytest.approx(stream["images_per_s"] / pil["images_per_s"])
        assert stream["of_torchcodec"] == pytest.approx(stream["images_per_s"] / codec["images_per_s"])
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]  # its own files are gone


def test_all_deliver_the_images_that_are_there(packed: Path, tmp_path: Path) -> None:
    manifest = loader.manifests.load(packed)
    loader.extract(str(packed), manifest, tmp_path)
    config = loader.build_config(str(packed), 12, 8, 1)
    folders = [loader.image_folder(config, tmp_path, how) for how in (loader.PIL, loader.CODEC)]
    for source in (loader.stream(config, manifest), *folders):
        seen: set[int] = set()
        others = set(multiprocessing.active_children())  # such as the process groups of other tests
        with source as batches:
            for _ in range(12):
                images = next(batches)
                assert (images.shape, images.dtype) == ((8, 3, 12, 12), torch.uint8)
                seen |= set(images.unique().tolist())
        assert seen == {25 * label for label in range(8)}
        assert set(multiprocessing.active_children()) <= others  # though the batches are still held
