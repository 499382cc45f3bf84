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
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from operator import truediv
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from torchvision import transforms
from torchvision.datasets.folder import ImageFolder, default_loader
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
SECONDS = 2.0
"""Time that a source is timed in a round."""
AHEAD = 2
"""Batches that a DataLoader's process prepares ahead."""
Source = AbstractContextManager[Iterator[Tensor]]


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
        return [row for config in configs for row in measure(config, manifest, Path(files), options.rounds)]


def build_config(shards: str, image_size: int, batch: int, workers: int) -> Config:
    data = {"shards": shards, "image_size": image_size, "workers": workers, "lanes": math.gcd(batch // 2, 8) or 1}
    raw = {"name": "bench", "epochs": 10**6, "data": data, "batch": {"global_size": batch}}
    return parse_config(raw, "benchmarks.loader")


def measure(config: Config, manifest: Manifest, files: Path, rounds: int) -> list[Row]:
    """The rows of one image size."""
    sources = {
        STREAM: partial(stream, config, manifest),
        PIL: partial(image_folder, config, files, PIL),
        CODEC: partial(image_folder, config, files, CODEC),
    }
    ahead = max(SLOTS + LENT, AHEAD * config.data.workers) + 1
    taken = [{name: delivered(source, ahead) for name, source in sources.items()} for _ in range(rounds)]
    rates = {name: [of[name][0] for of in taken] for name in sources}
    return [
        {
            "source": name,
            "image_size": config.data.image_size,
            "images_per_s": median(rates[name]),
            "of_pil": median(map(truediv, rates[name], rates[PIL])),
            "of_torchcodec": median(map(truediv, rates[name], rates[CODEC])),
            "cpu_ms": 1000 * median(of[name][1] for of in taken),
        }
        for name in sources
    ]


def delivered(source: Callable[[], Source], ahead: int) -> tuple[float, float]:
    """Images per second, and CPU seconds per image of this process and its children, after ``ahead`` batches."""

    def cpu_seconds() -> float:
        here = psutil.Process()
        return sum(sum(process.cpu_times()[:2]) for process in (here, *here.children(recursive=True)))

    with source() as batches:
        for _ in range(ahead):
            next(batches)
        images, cpu, started = 0, cpu_seconds(), time.perf_counter()
        while (passed := time.perf_counter() - started) < SECONDS or not images:
            images += len(next(batches))
        return images / passed, (cpu_seconds() - cpu) / images


@contextmanager
def stream(config: Config, manifest: Manifest) -> Iterator[Iterator[Tensor]]:
    with closing(TrainStream(manifest, manifest.class_ids("train"), config, 0, 1)) as source:
        yield (batch.images_b for batch in source)


@contextmanager
def image_folder(config: Config, files: Path, how: str) -> Iterator[Iterator[Tensor]]:
    kind: Any = transforms if how == PIL else v2
    steps = [kind.RandomResizedCrop(config.data.image_size, config.data.crop_scale), kind.RandomHorizontalFlip()]
    if how == PIL:
        read: Any = default_loader
        steps.append(kind.PILToTensor())
    else:
        from torchcodec.decoders import decode_image as read
    images = ImageFolder(files, kind.Compose(steps), loader=read, is_valid_file=lambda path: True)
    loader = DataLoader(
        images,
        batch_size=config.batch.global_size,
        sampler=RandomSampler(images, num_samples=10**6 * len(images)),
        num_workers=config.data.workers,
        drop_last=True,
    )
    with closing(images for images, _ in loader) as batches:  # the end of the loader's iterator ends its processes
        yield batches


def extract(shards: str, manifest: Manifest, folder: Path) -> None:
    """Write the encoded training images as files, a folder per class."""
    for label in manifest.class_ids("train"):
        (folder / f"{label:06d}").mkdir(parents=True)
    for shard in manifest.splits["train"]:
        labels = dict(zip(shard.ids, shard.classes, strict=True))
        for sample_id, data in read_shard(shards, shard, labels):
            (folder / f"{labels[sample_id]:06d}" / manifests.key(sample_id)).write_bytes(data)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = common.parser(__doc__, batch=112, rounds=5)
    parser.add_argument("--shards", metavar="DIR", required=True, help="shards to read")
    parser.add_argument("--sizes", type=common.numbers, default=[224], metavar="S,S", help="pixels of an image's side")
    parser.add_argument("--workers", type=int, default=2, help="decoding processes")
    return common.main(parser, arguments, run)


if __name__ == "__main__":
    sys.exit(main())
