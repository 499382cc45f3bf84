"""Manifests and small shards that ``pack`` did not write, and what a stream makes of them."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import torch
from hypothesis import settings
from webdataset import TarWriter

from dist_obdsd.config import Config, parse_config
from dist_obdsd.data.manifest import Manifest, Shard, key, to_json
from dist_obdsd.data.packing.shard_assignment import FEWEST_GROUPS, assign_training, shard_count
from dist_obdsd.data.schedule import EpochPlan, plan_epoch
from dist_obdsd.data.stream import TrainBatch, TrainStream
from tests.data.pictures import noise

CLASSES, PER_CLASS, SHARDS, SIZE = 12, 12, 8, 8
Data = tuple[Path, Manifest]
LONG = int(os.environ.get("DIST_OBDSD_EXAMPLES", "1"))
"""Multiplies the number of examples of the property tests, which are then drawn anew in every run."""


def examples(n: int) -> settings:
    return settings(max_examples=n * LONG, deadline=None, derandomize=LONG == 1, print_blob=True)


def unwritten(file: str, ids: Sequence[int], labels: Sequence[int], roles: Sequence[str] = ()) -> Shard:
    """A shard without a file, of images to train on unless their roles are given."""
    return Shard(file, 1, "", tuple(ids), tuple(labels), tuple(roles) or ("train",) * len(ids))


def manifest_of(labels: Sequence[Sequence[int]], ids: Sequence[Sequence[int]] | None = None, K: int = 2) -> Manifest:
    """A manifest whose shard i holds images of the classes ``labels[i]``, with ids counted through by default."""
    starts = [0, *accumulate(map(len, labels))]
    ids = ids or [range(a, b) for a, b in pairwise(starts)]
    shards = zip(ids, labels, strict=True)
    train = tuple(unwritten(f"train-{n:06d}.tar", *shard) for n, shard in enumerate(shards))
    names = range(1 + max((label for shard in labels for label in shard), default=0))
    return Manifest({}, 0, K, tuple(map(str, names)), {"train": train})


def packed(counts: list[int], K: int = 2, seed: int = 0, shards: int | None = None) -> Manifest:
    """What ``pack`` makes of classes of ``counts`` images, all at least K; ``shards``: another number of them."""
    members = {label: range(a, b) for label, (a, b) in enumerate(pairwise([0, *accumulate(counts)]))}
    label_of = np.repeat(np.arange(len(counts)), counts).tolist()
    number = shards or shard_count(sum(n // K for n in counts), 20_000 * len(label_of), FEWEST_GROUPS)
    ids = assign_training(members, K, number, seed)
    return manifest_of([[label_of[i] for i in shard] for shard in ids], ids, K)


def plan_of(manifest: Manifest, epoch: int = 0, classes: list[int] | None = None, **changes: int | str) -> EpochPlan:
    wanted = list(range(len(manifest.classes))) if classes is None else classes
    options = {"seed": 0, "global_size": 32, "samples_per_class": 2, "lanes": 4, "window": 2} | changes
    return plan_epoch(manifest, wanted, epoch=epoch, **options)


def picture(sample_id: int) -> bytes:
    """The image of an id, every third one a JPEG."""
    return noise(sample_id, "PNG" if sample_id % 3 else "JPEG")


def write_shard(folder: Path, shard: Shard, image: Callable[[int], bytes] = picture) -> Shard:
    """Write a tar; returns the shard with its size and sum."""
    path = folder / shard.file
    with TarWriter(str(path)) as tar:
        for i, label in zip(shard.ids, shard.classes, strict=True):
            tar.write({"__key__": key(i), "png" if i % 3 else "jpg": image(i), "cls": str(label).encode()})
    data = path.read_bytes()
    return replace(shard, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def write_shards(folder: Path, manifest: Manifest) -> Manifest:
    """Write all shards and the manifest, which is returned with their sizes and sums."""
    folder.mkdir(exist_ok=True)
    splits = {name: tuple(write_shard(folder, s) for s in shards) for name, shards in manifest.splits.items()}
    written = replace(manifest, splits=splits)
    (folder / "manifest.json").write_text(to_json(written))
    return written


def config_of(
    folder: Path | str, epochs: int = 2, batch_size: int = 5, global_size: int = 16, K: int = 2, **data: object
) -> Config:
    usual = {"image_size": SIZE, "mean": [0.5], "std": [0.5], "lanes": 4, "window": 1, "workers": 0}
    raw = {
        "name": "test",
        "epochs": epochs,
        "model": {"backbone": "small_cnn"},
        "data": {"shards": str(folder)} | usual | data,
        "batch": {"global_size": global_size, "samples_per_class": K},
        "evaluation": {"batch_size": batch_size},
    }
    return parse_config(raw, "test")


@contextmanager
def streamed(data: Data, config: Config, *place: int) -> Iterator[TrainStream]:
    """A stream; ``place`` is rank, world size and, if wanted, epoch and step."""
    with closing(TrainStream(data[1], data[1].class_ids("train"), config, *(place or (0, 1)))) as source:
        yield source


def batches(data: Data, config: Config, *place: int) -> list[TrainBatch]:
    with streamed(data, config, *place) as source:
        return list(source)


def joined(parts: list[list[TrainBatch]]) -> Iterator[tuple[int, int, list[bytes], list[int], list[int]]]:
    """Epoch, step, images, ids and labels of the global batches, from those of every rank."""
    for step in zip(*parts, strict=True):
        for other in step[1:]:
            assert (other.epoch, other.step) == (step[0].epoch, step[0].step)
            assert torch.equal(other.labels_B, step[0].labels_B)
        images = [image.numpy().tobytes() for batch in step for image in batch.images_b]
        ids = torch.cat([batch.ids_b for batch in step]).tolist()
        yield step[0].epoch, step[0].step, images, ids, step[0].labels_B.tolist()


def same(a: list[list[TrainBatch]], b: list[list[TrainBatch]]) -> bool:
    """Compare the global batches of two sets of ranks."""
    return list(joined(a)) == list(joined(b))
