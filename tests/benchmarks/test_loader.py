"""The benchmark of the loader on a few small images: both sources deliver, with true figures."""

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import loader
from dist_obdsd.data import manifest as manifests
from dist_obdsd.data.packing.pack import pack
from dist_obdsd.data.packing.recipes import load_recipe
from tests import runs

SMALL = {"classes": 16, "per_class": 8, "width": 40, "height": 30}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loader, "MADE", SMALL)
    monkeypatch.setattr(loader, "SECONDS", 0.05)
    monkeypatch.setattr(loader, "ROUNDS", 1)
    monkeypatch.setattr(loader.tempfile, "tempdir", str(tmp_path))


def bench(*arguments: object) -> list[dict[str, object]]:
    arguments = ("--batch", 16, "--budget", 20, *arguments)
    assert loader.main([*map(str, arguments)]) == 0
    return json.loads(Path(arguments[-1]).read_text())["rows"]


def test_images_of_its_own(quick: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = bench("--workers", 1, "--sizes", "8,24", "--json", tmp_path / "b.json")
    sizes = [row["image_size"] for row in rows]
    assert [row["source"] for row in rows] == 2 * [loader.STREAM, loader.PIL, loader.CODEC]
    assert sizes == [8] * 3 + [24] * 3
    for row in rows:
        assert (row["batch"], row["workers"]) == (16, 1)
        assert 0 < row["images_per_s"] <= row["best"]
        assert min(row["per_core"], row["cpu_ms"], row["of_pil"], row["of_torchcodec"]) > 0
        assert 0 <= row["wait_share"] < 1
    assert rows[1]["of_pil"] == rows[2]["of_torchcodec"] == 1
    assert "bytes_per_image" in capfd.readouterr().out
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []  # its own files are gone


def test_shards_are_read_and_their_images_become_the_folder(quick: None, tmp_path: Path) -> None:
    source = runs.make_images(tmp_path / "source", classes=12)
    recipe = load_recipe("folder").model_copy(update={"options": {"test_fraction": 0.25}})
    manifest = pack(recipe, source, tmp_path / "shards")
    row, folder, codec = bench(
        "--workers", 0, "--sizes", 8, "--shards", tmp_path / "shards", "--json", tmp_path / "b.json"
    )
    train = [path for path in source.rglob("*.png") if path.parent.name in manifest.classes]
    loader.extract(str(tmp_path / "shards"), manifest, tmp_path / "files")
    files = {path.parent.name + "/" + path.name: path.read_bytes() for path in (tmp_path / "files").rglob("*/*")}
    labels = manifest.class_ids("train")
    assert len(labels) == 9
    names = [manifest.classes[label] for label in labels]
    wanted = sorted(path.read_bytes() for path in train if path.parent.name in names)
    assert sorted(files.values()) == wanted
    assert folder["bytes_per_image"] == pytest.approx(np.mean([len(data) for data in wanted]))
    assert codec["bytes_per_image"] == folder["bytes_per_image"]
    assert row["bytes_per_image"] >= sum(shard.bytes for shard in manifest.splits["train"]) / len(wanted)


def test_all_deliver_the_images_that_are_there(tmp_path: Path) -> None:
    """One colour per class, so that an image tells its class however it was cropped."""
    loader.make_images(tmp_path / "made", classes=2, per_class=3, width=20, height=16)
    assert len({path.read_bytes() for path in (tmp_path / "made").rglob("*.jpg")}) == 6
    for label in range(8):
        (tmp_path / "images" / str(label)).mkdir(parents=True)
        for i in range(4):
            loader.Image.new("RGB", (20, 16), (25 * label, 0, 0)).save(tmp_path / "images" / str(label) / f"{i}.png")
    recipe = load_recipe("folder").model_copy(update={"options": {"test_fraction": 0}})
    manifest = pack(recipe, tmp_path / "images", tmp_path / "shards")
    config = loader.build_config(str(tmp_path / "shards"), 12, 8, 1)
    folders = [loader.image_folder(config, tmp_path / "images", how) for how in (loader.PIL, loader.CODEC)]
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
    assert set(manifests.load(tmp_path / "shards").splits) == {"train"}


def test_waiting_is_the_consumer_s() -> None:
    def slow():
        while True:
            loader.time.sleep(0.02)
            yield torch.zeros(4)

    rate, waited, _ = loader.delivered(slow(), 0.3, 0)
    assert rate < 200
    assert waited > 0.5
    rate, waited, _ = loader.delivered(slow(), 0.3, 0.06)
    assert rate < 50
    assert waited > 0.1


def test_what_does_not_fit_is_said(quick: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert loader.main(["--shards", str(tmp_path / "none")]) == 2
    assert "there is no shard folder" in capfd.readouterr().err
    assert loader.main(["--batch", "15"]) == 2
    assert "batch.global_size=15" in capfd.readouterr().err
    assert loader.main(["--workers", "-1"]) == 2
    assert "data.workers" in capfd.readouterr().err
