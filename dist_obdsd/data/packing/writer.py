"""Writing images into shards. The same images give the same bytes."""

import hashlib
import json
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from webdataset import TarWriter

from dist_obdsd import console
from dist_obdsd.data.manifest import Shard, key
from dist_obdsd.data.packing.parallel import in_order, threads
from dist_obdsd.data.packing.readers import Sample
from dist_obdsd.data.packing.shard_assignment import (
    FEWEST_GROUPS,
    FEWEST_IMAGES,
    assign_evenly,
    assign_training,
    shard_count,
)
from dist_obdsd.errors import RunError

WRITERS = 4  # shards in memory at a time, of 64 MiB or somewhat more each


@dataclass(frozen=True)
class UsableImage:
    """An image that was decoded once, and is read again when its shard is written."""

    sample: Sample
    suffix: str
    read: Callable[[], bytes]
    bytes: int
    checksum: int


def write_shards(
    images: Sequence[UsableImage], samples_per_class: int, seed: int, folder: Path, pool: Executor | None, workers: int
) -> tuple[dict[str, tuple[Shard, ...]], tuple[str, ...]]:
    """Number images and classes in their order, and write the shards."""
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
            count = shard_count(groups, size, FEWEST_GROUPS)
            assigned = assign_training(by_class, samples_per_class, count, seed)
        else:
            ids = [i for ids in by_class.values() for i in ids]
            assigned = assign_evenly(ids, shard_count(len(ids), size, FEWEST_IMAGES), seed, split)
        shards += [(split, f"{split}-{n:06d}.tar", ids) for n, ids in enumerate(assigned)]
    splits: dict[str, list[Shard]] = {split: [] for split in members}
    # Read here, where the archive is open, and written elsewhere. Whole shards are on the way, so few at a time.
    workers = min(workers, WRITERS)
    with threads(workers) as readers, console.bar(len(images), "images", "writing") as bar:
        write = partial(_write_shard, folder=folder, images=images, numbers=numbers, pool=pool)
        written = in_order(readers, write, [(file, ids) for _, file, ids in shards], workers)
        for (split, _, _), shard in zip(shards, written, strict=True):
            splits[split].append(shard)
            bar.update(len(shard))
    return {split: tuple(found) for split, found in splits.items()}, classes


def _write_shard(
    task: tuple[str, list[int]],
    folder: Path,
    images: Sequence[UsableImage],
    numbers: dict[str, int],
    pool: Executor | None,
) -> Shard:
    name, ids = task
    classes = tuple(numbers[images[i].sample.class_name] for i in ids)
    rows = []
    for i, class_id in zip(ids, classes, strict=True):
        image = images[i]
        data = image.read()
        if zlib.crc32(data) != image.checksum:
            raise RunError(f"{image.sample.name} changed while it was packed; pack again when nothing writes there")
        rows.append((i, class_id, image.sample.name, image.suffix, data))
    path = folder / name
    size, sha256 = pool.submit(_write_tar, path, rows).result() if pool else _write_tar(path, rows)
    roles = tuple(images[i].sample.role for i in ids)
    return Shard(file=name, bytes=size, sha256=sha256, ids=tuple(ids), classes=classes, roles=roles)


def _write_tar(path: Path, rows: list[tuple[int, int, str, str, bytes]]) -> tuple[int, str]:
    """Write (id, class, name, suffix, image) rows; return size in bytes and SHA-256."""
    # Nothing of the time, the user or the machine goes into the tar.
    with TarWriter(str(path), user="", group="", mode=0o444, mtime=0, encoder=False) as tar:
        for i, class_id, name, suffix, data in rows:
            meta = {"id": i, "class": class_id, "name": name}
            tar.write(
                {
                    "__key__": key(i),
                    suffix: data,
                    "cls": str(class_id).encode(),
                    "json": json.dumps(meta, sort_keys=True).encode(),
                }
            )
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
