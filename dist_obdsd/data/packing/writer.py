"""Writing images into shards. The same images give the same bytes."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from webdataset import TarWriter

from dist_obdsd import console
from dist_obdsd.data.manifest import Shard, key
from dist_obdsd.data.packing import shard_assignment as assignment
from dist_obdsd.data.packing.readers.base import Sample
from dist_obdsd.data.parallel import in_order


@dataclass(frozen=True)
class UsableImage:
    """An image that was decoded once, and is read again when its shard is written."""

    sample: Sample
    suffix: str
    bytes: int


Row = tuple[int, int, UsableImage]  # id, class, image


def write_shards(
    images: Sequence[UsableImage], samples_per_class: int, seed: int, folder: Path, pool: Executor | None, workers: int
) -> tuple[dict[str, tuple[Shard, ...]], tuple[str, ...]]:
    """Number images and classes in their order, and write the shards of each split."""
    classes = tuple(dict.fromkeys(image.sample.class_name for image in images))
    numbers = {name: number for number, name in enumerate(classes)}
    labels = [numbers[image.sample.class_name] for image in images]
    members: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        members[image.sample.split][label].append(i)
    shards: list[tuple[str, str, list[int]]] = []  # split, file, ids
    for split, by_class in members.items():
        size = sum(images[i].bytes for ids in by_class.values() for i in ids)
        if split == "train":
            groups = sum(len(ids) // samples_per_class for ids in by_class.values())
            count = assignment.shard_count(groups, size, assignment.FEWEST_GROUPS)
            assigned = assignment.assign_training(by_class, samples_per_class, count, seed)
        else:
            ids = [i for ids in by_class.values() for i in ids]
            count = assignment.shard_count(len(ids), size, assignment.FEWEST_IMAGES)
            assigned = assignment.assign_evenly(ids, count, seed, split)
        shards += [(split, f"{split}-{n:06d}.tar", ids) for n, ids in enumerate(assigned)]

    splits: dict[str, list[Shard]] = {split: [] for split in members}
    with console.bar(len(images), "images", "writing") as bar:
        tasks = [(folder / file, [(i, labels[i], images[i]) for i in ids]) for _, file, ids in shards]
        written = in_order(pool, _write_tar, tasks, workers)
        for (split, file, ids), (size, sha256) in zip(shards, written, strict=True):
            roles = tuple(images[i].sample.role for i in ids)
            splits[split].append(Shard(file, size, sha256, tuple(ids), tuple(labels[i] for i in ids), roles))
            bar.update(len(ids))
    return {split: tuple(found) for split, found in splits.items()}, classes


def _write_tar(task: tuple[Path, list[Row]]) -> tuple[int, str]:
    """Write rows to a path; return size in bytes and SHA-256."""
    path, rows = task
    # Nothing of the time, the user or the machine goes into the tar.
    with TarWriter(str(path), user="", group="", mode=0o444, mtime=0, encoder=False) as tar:
        for i, label, image in rows:
            meta = json.dumps({"id": i, "class": label, "name": image.sample.name}, sort_keys=True)
            data = image.sample.read()
            tar.write({"__key__": key(i), image.suffix: data, "cls": str(label).encode(), "json": meta.encode()})
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
