"""Writing images into shards. The same images give the same bytes."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from webdataset import TarWriter

from dist_obdsd import console
from dist_obdsd.data.manifest import Shard, key
from dist_obdsd.data.packing import shard_assignment as assignment
from dist_obdsd.data.packing.readers.base import Sample
from dist_obdsd.data.parallel import in_order

WRITERS = 4  # shards in memory at a time, of 64 MiB or somewhat more each
Row = tuple[int, int, str, str, bytes]  # id, class, name, suffix, encoded image


@dataclass(frozen=True)
class UsableImage:
    """An image that was decoded once, and is read again when its shard is written."""

    sample: Sample
    suffix: str
    read: Callable[[], bytes]
    bytes: int


def write_shards(
    images: Sequence[UsableImage], samples_per_class: int, seed: int, folder: Path, pool: Executor | None, workers: int
) -> tuple[dict[str, tuple[Shard, ...]], tuple[str, ...]]:
    """Number images and classes in their order, and write the shards of each split."""
    classes = tuple(dict.fromkeys(image.sample.class_name for image in images))
    numbers = {name: number for number, name in enumerate(classes)}
    members: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, image in enumerate(images):
        members[image.sample.split][numbers[image.sample.class_name]].append(i)
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

    def row(i: int) -> Row:
        image = images[i]
        return i, numbers[image.sample.class_name], image.sample.name, image.suffix, image.read()

    splits: dict[str, list[Shard]] = {split: [] for split in members}
    with console.bar(len(images), "images", "writing") as bar:
        # Read here, where the archive is open, and written elsewhere.
        tasks = ((folder / file, [row(i) for i in ids]) for _, file, ids in shards)
        written = in_order(pool, _write_tar, tasks, min(workers, WRITERS))
        for (split, file, ids), (size, sha256) in zip(shards, written, strict=True):
            labels = tuple(numbers[images[i].sample.class_name] for i in ids)
            roles = tuple(images[i].sample.role for i in ids)
            splits[split].append(Shard(file, size, sha256, tuple(ids), labels, roles))
            bar.update(len(ids))
    return {split: tuple(found) for split, found in splits.items()}, classes


def _write_tar(task: tuple[Path, list[Row]]) -> tuple[int, str]:
    """Write rows to a path; return size in bytes and SHA-256."""
    path, rows = task
    # Nothing of the time, the user or the machine goes into the tar.
    with TarWriter(str(path), user="", group="", mode=0o444, mtime=0, encoder=False) as tar:
        for i, class_id, name, suffix, data in rows:
            meta = json.dumps({"id": i, "class": class_id, "name": name}, sort_keys=True)
            tar.write({"__key__": key(i), suffix: data, "cls": str(class_id).encode(), "json": meta.encode()})
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
