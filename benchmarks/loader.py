"""Batches from shards beside the usual way, an image folder in a DataLoader, read with PIL or with TorchCodec.

All deliver uint8 [batch, 3, s, s] of the same encoded images, cropped and flipped at random, with as many processes.
They take turns for several rounds, so that only one of them has processes at a time. A round starts its source anew;
it is timed when all that it decoded ahead is used up. All read from the page cache.

    images_per_s          of a consumer that does nothing else, the median over the rounds
    of_pil, of_torchcodec the medians of the rounds' ratios to the image folders
    cpu_ms                CPU time per image of this process and the decoding ones, which other work disturbs little
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmarks import common
from benchmarks.common import Row
from dist_obdsd.config import Config, parse_config
from dist_obdsd.data import manifest as manifests
from dist_obdsd.data.decoding_workers import LENT, SLOTS
from dist_obdsd.data.manifest import Manifest
from dist_obdsd.data.shard_reader import read_shard
from dist_obdsd.data.stream import TrainStream

STREAM, PIL, CODEC = "stream", "image folder, PIL", "image folder, TorchCodec"
ROUNDS = 5
SECONDS = 2.0
"""Time that a source is timed in a round."""
AHEAD = 2
"""Batches that a DataLoader's process prepares ahead, torch's default."""


def run(options: argparse.Namespace) -> list[Row]:
    """Three rows per image size, one per source.

    Raises:
        InputError: the shards do not fit the batch.
    """
    torch.set_num_threads(options.threads)
    manifest = manifests.load(options.shards)
    configs = [build_config(options.shards, size, options.batch, options.workers) for size in options.sizes]
    with tempfile.TemporaryDirectory(prefix="dist-obdsd-bench-") as files:
        extract(options.shards, manifest, Path(files))
        return [row for config in configs for row in measure(config, manifest, Path(files), options.budget)]


def build_config(shards: str, image_size: int, batch: int, workers: int) -> Config:
    data = {"shards": shards, "image_size": image_size, "workers": workers, "lanes": math.gcd(batch // 2, 8) or 1}
    raw = {"name": "bench", "epochs": 10**6, "data": data, "batch": {"global_size": batch}}
    return parse_config(raw, "benchmarks.loader")


def measure(config: Config, manifest: Manifest, files: Path, budget: float) -> list[Row]:
    """The rows of one image size: ``ROUNDS`` rounds, or as many as the budget (seconds) allows, but one at least."""
    sources = {
        STREAM: partial(stream, config, manifest),
        PIL: partial(image_folder, config, files, PIL),
        CODEC: partial(image_folder, config, files, CODEC),
    }
    ahead = max(SLOTS + LENT, AHEAD * config.data.workers) + 1
    started, rounds = time.perf_counter(), list[dict[str, tuple[float, float]]]()
    # A round more, if it can end in time.
    while not rounds or (len(rounds) < ROUNDS and (time.perf_counter() - started) * (1 + 1 / len(rounds)) < budget):
        figures = {}
        for name, source in sources.items():
            with source() as batches:
                for _ in range(ahead):
                    next(batches)
                figures[name] = delivered(batches, SECONDS)
        rounds.append(figures)
    about = {"image_size": config.data.image_size, "batch": config.batch.global_size, "workers": config.data.workers}
    return [
        {"source": name} | about | {
            "images_per_s": statistics.median(of[name][0] for of in rounds),
            "of_pil": statistics.median(of[name][0] / of[PIL][0] for of in rounds),
            "of_torchcodec": statistics.median(of[name][0] / of[CODEC][0] for of in rounds),
            "cpu_ms": 1000 * statistics.median(of[name][1] for of in rounds),
        }
        for name in sources
    ]  # fmt: skip


def delivered(batches: Iterator[Tensor], seconds: float) -> tuple[float, float]:
    """Images per second, and CPU seconds per image of this process and its children, over ``seconds`` at least."""

    def cpu_seconds() -> float:
        here = psutil.Process()
        return sum(sum(process.cpu_times()[:2]) for process in (here, *here.children(recursive=True)))

    images, cpu, started = 0, cpu_seconds(), time.perf_counter()
    while (passed := time.perf_counter() - started) < seconds or not images:
        images += len(next(batches))
    return images / passed, (cpu_seconds() - cpu) / images


@contextmanager
def stream(config: Config, manifest: Manifest) -> Iterator[Iterator[Tensor]]:
    source = TrainStream(manifest, manifest.class_ids("train"), config, 0, 1)
    try:
        yield (batch.images_b for batch in source)
    finally:
        source.close()


@contextmanager
def image_folder(config: Config, files: Path, how: str) -> Iterator[Iterator[Tensor]]:
    kind: Any = transforms if how == PIL else v2
    steps = [kind.RandomResizedCrop(config.data.image_size, config.data.crop_scale), kind.RandomHorizontalFlip()]
    if how == PIL:
        more: dict[str, Any] = {"transform": kind.Compose([*steps, kind.PILToTensor()])}
    else:
        from torchcodec.decoders import decode_image

        more = {"transform": kind.Compose(steps), "loader": decode_image}
    images, workers = ImageFolder(files, is_valid_file=lambda path: True, **more), config.data.workers
    loader = DataLoader(
        images,
        batch_size=config.batch.global_size,
        sampler=RandomSampler(images, num_samples=10**6 * len(images)),
        num_workers=workers,
        prefetch_factor=AHEAD if workers else None,
        drop_last=True,
    )
    batches = (images for images, _ in loader)
    try:
        yield batches
    finally:
        batches.close()  # lets go of the loader's iterator, which ends its processes


def extract(shards: str, manifest: Manifest, folder: Path) -> None:
    """Write the encoded training images as files, a folder per class."""
    for label in manifest.class_ids("train"):
        (folder / f"{label:06d}").mkdir(parents=True)
    for shard in manifest.splits["train"]:
        labels = dict(zip(shard.ids, shard.classes, strict=True))
        for sample_id, data in read_shard(shards, shard, labels):
            (folder / f"{labels[sample_id]:06d}" / manifests.key(sample_id)).write_bytes(data)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--shards", metavar="DIR", required=True, help="shards to read")
    parser.add_argument("--sizes", type=common.numbers, default=[224], metavar="S,S", help="pixels (default: 224)")
    parser.add_argument("--batch", type=int, default=112, help="images in a batch (default: 112)")
    parser.add_argument("--workers", type=int, default=2, help="decoding processes (default: 2)")
    parser.add_argument("--budget", type=float, default=120, help="seconds of an image size (default: 120)")
    return common.main(parser, arguments, run)


if __name__ == "__main__":
    sys.exit(main())
