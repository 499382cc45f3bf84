"""Batches from shards beside the usual way, an image folder in a DataLoader, read with PIL or with TorchCodec.

The same encoded images, image size, batch size, crop and number of processes; all deliver uint8 [batch, 3, s, s] on
the CPU, since normalising is the network's work here and can be for any. The usual way is torchvision's
``ImageFolder``, shuffled, with ``RandomResizedCrop`` and ``RandomHorizontalFlip`` on PIL images, or those of
torchvision's v2 on what TorchCodec decodes; the stream's batches are balanced by class.

They take turns for several rounds, and only one of them has processes at a time. All read from the page cache,
since shards and files were written or read just before. A round starts its source anew and lets it deliver until all
that it decoded ahead is used up; only what follows is timed, so neither the start of processes nor a filled queue
counts.
"""

import argparse
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmarks import common
from benchmarks.common import Row
from dist_obdsd.config import Config, parse_config
from dist_obdsd.data import manifest as manifests
from dist_obdsd.data.decoding_workers import LENT, SLOTS, DecodeTask, decode_tasks
from dist_obdsd.data.manifest import Manifest
from dist_obdsd.data.packing.pack import pack
from dist_obdsd.data.packing.recipes import load_recipe
from dist_obdsd.data.shard_reader import read_shard
from dist_obdsd.data.stream import TrainStream
from dist_obdsd.errors import InputError
from dist_obdsd.rng import rng

STREAM, PIL, CODEC = "stream", "image folder, PIL", "image folder, TorchCodec"
ROUNDS = 5
SECONDS = 2.0  # that a part of a round is timed
AHEAD = 2  # batches that a DataLoader's process prepares ahead, torch's default
SAMPLE = 300  # images that one core decodes over and over
MADE = {"classes": 128, "per_class": 16, "width": 320, "height": 240}  # the images that the bench makes itself

Source = Callable[[], AbstractContextManager[Iterator[Tensor]]]


def run(options: argparse.Namespace) -> list[Row]:
    """Three rows per image size, one per source.

    ``images_per_s`` is the median over the rounds of what a consumer gets that does nothing else, ``best`` the quickest
    round, ``of_pil`` and ``of_torchcodec`` the median of the rounds' ratios to the image folders. ``cpu_ms`` is CPU
    time per image of this process and the decoding ones, and depends little on what else is running. ``wait_share`` is
    the part of its time that a consumer waits which takes as long over a batch as the stream needs to deliver one (it
    sleeps, as if a GPU worked).
    ``bytes_per_image`` are read from storage per delivered image: the shards of an epoch's plan, or the files.
    ``per_core`` are images per second of CPU time of decoding and augmenting alone, in one process.

    Raises:
        InputError: the shards do not fit the batch, or the temporary folder cannot hold their images.
    """
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="dist-obdsd-bench-") as temporary:
        files = Path(temporary) / "images"
        if options.shards is None:
            shards = str(Path(temporary) / "shards")
            make_images(files, **MADE)
            recipe = load_recipe("folder").model_copy(update={"options": {"test_fraction": 0}})
            manifest = pack(recipe, files, Path(shards))
        else:
            shards = options.shards
            manifest = manifests.load(shards)
            extract(shards, manifest, files)
        rows = []
        for size in options.sizes:
            config = build_config(shards, size, options.batch, options.workers)
            rows += measure(config, manifest, files, options.budget)
        return rows


def build_config(shards: str, image_size: int, batch: int, workers: int) -> Config:
    data = {"shards": shards, "image_size": image_size, "workers": workers, "lanes": math.gcd(batch // 2, 8) or 1}
    raw = {"name": "bench", "epochs": 10**6, "data": data, "batch": {"global_size": batch}}
    return parse_config(raw, "benchmarks.loader")


def measure(config: Config, manifest: Manifest, files: Path, budget: float) -> list[Row]:
    """The rows of one image size: ``ROUNDS`` rounds, or as many as the budget (seconds) allows, but one at least."""
    sources: dict[str, Source] = {
        STREAM: lambda: stream(config, manifest),
        PIL: lambda: image_folder(config, files, PIL),
        CODEC: lambda: image_folder(config, files, CODEC),
    }
    ahead = max(SLOTS + LENT, AHEAD * config.data.workers) + 1
    rates: dict[str, list[float]] = {name: [] for name in sources}
    waits: dict[str, list[float]] = {name: [] for name in sources}
    cpu: dict[str, list[float]] = {name: [] for name in sources}
    started = time.perf_counter()
    while not rates[CODEC] or (
        # A round more, if it can end in time.
        (time.perf_counter() - started) * (1 + 1 / len(rates[CODEC])) < budget and len(rates[CODEC]) < ROUNDS
    ):
        for name, source in sources.items():
            with source() as batches:
                for _ in range(ahead):
                    next(batches)
                before = cpu_seconds()
                rate, _, images = delivered(batches, SECONDS, 0)
                rates[name].append(rate)
                cpu[name].append((cpu_seconds() - before) / images)
                step = config.batch.global_size / rates[STREAM][-1]
                waits[name].append(delivered(batches, SECONDS, step)[1])
    read, alone = bytes_per_image(config, manifest, files), per_core(config, files)
    return [
        {
            "source": name,
            "image_size": config.data.image_size,
            "batch": config.batch.global_size,
            "workers": config.data.workers,
            "images_per_s": statistics.median(rates[name]),
            "best": max(rates[name]),
            "of_pil": statistics.median(a / b for a, b in zip(rates[name], rates[PIL], strict=True)),
            "of_torchcodec": statistics.median(a / b for a, b in zip(rates[name], rates[CODEC], strict=True)),
            "cpu_ms": 1000 * statistics.median(cpu[name]),
            "wait_share": statistics.median(waits[name]),
            "bytes_per_image": read[name],
            "per_core": alone[name],
        }
        for name in sources
    ]


def delivered(batches: Iterator[Tensor], seconds: float, step: float) -> tuple[float, float, int]:
    """Images per second, the share of the time that the consumer waited, and images, over ``seconds`` at least.

    Args:
        step: seconds that the consumer takes over a batch.
    """
    images, waited = 0, 0.0
    started = now = time.perf_counter()
    while now - started < seconds:
        images += len(next(batches))
        waited += time.perf_counter() - now
        time.sleep(step)
        now = time.perf_counter()
    return images / (now - started), waited / (now - started), images


def cpu_seconds() -> float:
    """CPU time of this process and the living ones below it."""
    here = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (here, *here.children(recursive=True)))


@contextmanager
def stream(config: Config, manifest: Manifest) -> Iterator[Iterator[Tensor]]:
    source = TrainStream(manifest, manifest.class_ids("train"), config, 0, 1)
    try:
        yield (batch.images_b for batch in source)
    finally:
        source.close()


@contextmanager
def image_folder(config: Config, files: Path, how: str) -> Iterator[Iterator[Tensor]]:
    images = dataset(config, files, how)
    workers = config.data.workers
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


def dataset(config: Config, files: Path, how: str) -> ImageFolder:
    kind: Any = transforms if how == PIL else v2
    steps = [kind.RandomResizedCrop(config.data.image_size, config.data.crop_scale), kind.RandomHorizontalFlip()]
    if how == PIL:
        return ImageFolder(files, kind.Compose([*steps, kind.PILToTensor()]), is_valid_file=lambda path: True)
    from torchcodec.decoders import decode_image

    return ImageFolder(files, kind.Compose(steps), loader=decode_image, is_valid_file=lambda path: True)


def bytes_per_image(config: Config, manifest: Manifest, files: Path) -> dict[str, float]:
    source = TrainStream(manifest, manifest.class_ids("train"), config.model_copy(update={"epochs": 1}), 0, 1)
    try:
        plan = source.plan(0)
    finally:
        source.close()
    shards = manifest.splits["train"]
    read = sum(shards[i].bytes for windows in plan.windows for window in windows for i in window)
    sizes = [path.stat().st_size for path in files.rglob("*") if path.is_file()]
    return {STREAM: read / plan.ids_SB.size, PIL: statistics.mean(sizes), CODEC: statistics.mean(sizes)}


def per_core(config: Config, files: Path) -> dict[str, float]:
    """Each way in this process, in turns; the quickest turn counts."""
    folders = {how: dataset(config, files, how) for how in (PIL, CODEC)}
    samples = folders[PIL].samples
    chosen = torch.linspace(0, len(samples) - 1, min(SAMPLE, len(samples))).long().tolist()
    rows = [DecodeTask(i, Path(samples[i][0]).read_bytes(), (0, 0, i)) for i in chosen]
    size = config.data.image_size
    out = torch.empty(len(rows), config.data.channels, size, size, dtype=torch.uint8)

    def folder(how: str) -> None:
        torch.stack([folders[how][i][0] for i in chosen], out=out)

    ways: dict[str, Callable[[], Any]] = {STREAM: lambda: decode_tasks(rows, out, config, 1)}
    ways |= {how: partial(folder, how) for how in folders}
    best = dict.fromkeys(ways, math.inf)
    for _ in range(ROUNDS):
        for name, way in ways.items():
            started = time.process_time()
            way()
            best[name] = min(best[name], time.process_time() - started)
    return {name: len(rows) / seconds for name, seconds in best.items()}


def make_images(folder: Path, classes: int, per_class: int, width: int, height: int) -> None:
    """A folder of JPEGs per class: blurred noise under fine noise, which takes a photograph's share of bits."""
    for label in range(classes):
        (folder / f"{label:03d}").mkdir(parents=True)
        draw = rng(0, "bench loader", label)
        for i in range(per_class):
            coarse = Image.fromarray(draw.integers(0, 256, (6, 8, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
            pixels = np.clip(smooth + draw.normal(0, 8, (height, width, 1)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{label:03d}" / f"{i:03d}.jpg", quality=85)


def extract(shards: str, manifest: Manifest, folder: Path) -> None:
    """The encoded training images as files, a folder per class."""
    train = manifest.splits["train"]
    needed, free = sum(shard.bytes for shard in train), shutil.disk_usage(folder.parent).free
    if needed > free:
        raise InputError(
            f"{folder.parent} has {free / 2**30:.1f} GiB free, but the images of {shards} take {needed / 2**30:.1f}; "
            f"set TMPDIR to a larger folder"
        )
    for label in manifest.class_ids("train"):
        (folder / f"{label:06d}").mkdir(parents=True)
    for shard in train:
        labels = dict(zip(shard.ids, shard.classes, strict=True))
        for sample_id, data in read_shard(shards, shard, labels):
            (folder / f"{labels[sample_id]:06d}" / manifests.key(sample_id)).write_bytes(data)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--sizes", type=common.numbers, default=[224], metavar="S,S,...", help="pixels (default: 224)")
    parser.add_argument("--batch", type=int, default=112, help="images in a batch (default: 112)")
    parser.add_argument("--workers", type=int, default=2, help="decoding processes (default: 2)")
    parser.add_argument("--shards", metavar="DIR", help="shards to read (default: made-up images)")
    return common.main(parser.parse_args(arguments), run)


if __name__ == "__main__":
    sys.exit(main())
