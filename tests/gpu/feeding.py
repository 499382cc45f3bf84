"""Images on their way to a device: memory that is used again, and the wait for data."""

import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dist_obdsd.config import Config, override_config, parse_config
from dist_obdsd.data import manifest as manifests
from dist_obdsd.data.from_config import classes_from
from dist_obdsd.data.stream import TrainBatch, TrainStream
from dist_obdsd.transfer import DeviceUploader
from tests.gpu import bench
from tests.gpu.rig import CheckError
from tests.gpu.whole import command, shards


def make_jpegs(folder: Path, classes: int, per_class: int, size: tuple[int, int]) -> None:
    """A folder per class of photos without edges: a blurred pattern of the class, and one of the image."""
    rng = np.random.default_rng(0)
    for c in range(classes):
        pattern = rng.uniform(0, 255, (5, 6, 3))
        (folder / f"class_{c:03d}").mkdir(parents=True)
        for i in range(per_class):
            mixed = np.clip(pattern + rng.normal(0, 40, pattern.shape), 0, 255).astype(np.uint8)
            photo = Image.fromarray(mixed).resize(size, Image.Resampling.BICUBIC)
            photo.save(folder / f"class_{c:03d}" / f"{i}.jpg", quality=90)


def _settings(folder: Path, *overrides: str) -> Config:
    raw: dict[str, Any] = {
        "name": "feeding", "epochs": 2,
        "data": {"shards": str(folder / "packed"), "image_size": 96, "augment": "crop", "workers": 2, "lanes": 4},
        "batch": {"global_size": 16, "samples_per_class": 2},
    }  # fmt: skip
    return parse_config(override_config(raw, overrides), "the check")


def _batches(config: Config, **more: Any) -> Iterator[TrainBatch]:
    manifest = manifests.load(config.data.shards)
    classes, _ = classes_from(config, manifest)
    with closing(TrainStream(manifest, classes, config, 0, 1, **more)) as stream:
        try:
            yield from stream
        finally:
            if more.get("pinned"):  # the stream gives back the memory that the latest copies may still read
                torch.cuda.synchronize()


def uploads_arrive(device: torch.device, quick: bool) -> str:
    """Every batch of two epochs reaches a busy device as it was, though its memory is used again and again."""
    upload, count = DeviceUploader(device), 0
    with shards(lambda images: make_jpegs(images, 24, 8, (120, 90))) as folder:
        config = _settings(folder)
        busy = torch.randn(64 if quick else 2048, 64 if quick else 2048, device=device)
        arrived = []
        for batch in _batches(config, pinned=device.type == "cuda"):
            for _ in range(8):  # what the copy must not wait for, and what must not overtake it
                busy = (busy @ busy).clamp_(-1, 1)
            arrived.append(upload(batch.images_b).clone())
            del batch
        for batch, there in zip(_batches(config), arrived, strict=True):
            if not torch.equal(there.cpu(), batch.images_b):
                raise CheckError(f"batch {count} arrived with other pixels")
            count += 1
    return f"{count} batches with their pixels"


def data_wait(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """A row for each variant: the share of a training run's steps in which the host asked for images.

    Photos of 400 x 320 pixels, eight decoding processes; the variant ``none``, whose
    steps are the shortest, and ``obdsd``, in which the host waits for the diffusion's error and can hide less. Without
    the first epoch, in which everything warms up. A row that fails says so; the others are measured nevertheless.
    """
    rows: list[dict[str, Any]] = []
    size, classes = ((40, 32), 24) if quick else ((400, 320), 280)
    with shards(lambda images: make_jpegs(images, classes, 8, size)) as folder:
        for variant in ("none",) if quick else ("none", "obdsd"):
            row: dict[str, Any] = {"backbone": "small_cnn" if quick else "resnet50", "variant": variant}
            try:
                rows.append(row | _waited(folder, row, device, quick))
            except Exception as error:
                rows.append(row | bench.failure(error))
    return rows


def _waited(folder: Path, row: dict[str, Any], device: torch.device, quick: bool) -> dict[str, Any]:
    """What a run of its own found."""
    more = {
        "model.backbone": row["backbone"], "distillation.target": row["variant"],
        "data.image_size": "16" if quick else "224", "batch.global_size": "16" if quick else "112",
        "data.workers": "2" if quick else "8", "data.channels": "3", "data.lanes": "8", "data.augment": "crop",
        "device": device.type, "precision": "bf16", "optim.lr": "1e-5", "epochs": "4", "evaluation.test": "false",
    }  # fmt: skip
    shutil.rmtree(folder / "runs", ignore_errors=True)
    command("train", "tiny.yaml", *(f"{name}={value}" for name, value in more.items()))
    lines = (folder / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
    found = [line for line in map(json.loads, lines) if line["kind"] == "epoch" and line["epoch"] > 0]
    return _shares(found)


def _shares(epochs: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = sum(line["seconds"] for line in epochs)
    return {
        "images_per_s": sum(line["images_per_s"] * line["seconds"] for line in epochs) / seconds,
        "data wait": sum(line["data_wait_share"] * line["seconds"] for line in epochs) / seconds,
    }
