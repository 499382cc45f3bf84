"""Small shards that ``pack`` did not write, and what a stream makes of them."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from webdataset import TarWriter

from dist_obdsd.config import Config, parse_config
from dist_obdsd.data.manifest import Manifest, Shard, key, to_json
from dist_obdsd.data.stream import TrainBatch, TrainStream
from tests.data.pictures import noise

CLASSES, PER_CLASS, SHARDS, SIZE = 12, 12, 8, 8
Data = tuple[Path, Manifest]


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
    settings = {"image_size": SIZE, "mean": [0.5], "std": [0.5], "lanes": 4, "window": 1, "workers": 0}
    raw = {
        "name": "test",
        "epochs": epochs,
        "model": {"backbone": "small_cnn"},
        "data": {"shards": str(folder)} | settings | data,
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
