"""Small shards that ``pack`` did not write, and what a stream makes of them."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from webdataset import TarWriter

from dist_obdsd.config import Config, parse_config
from dist_obdsd.data.manifest import Manifest, Shard, key
from dist_obdsd.data.stream import TrainBatch, TrainStream
from tests.data.pictures import noise

CLASSES, PER_CLASS, SHARDS, SIZE = 12, 12, 8, 8
Data = tuple[Path, Manifest]


def picture(sample_id: int) -> bytes:
    """The image of an id, every third one a JPEG."""
    return noise(sample_id, "PNG" if sample_id % 3 else "JPEG")


def write_shard(
    path: Path, ids: Sequence[int], labels: Sequence[int], role: Callable[[int], str] = lambda i: "train"
) -> Shard:
    with TarWriter(str(path)) as tar:
        for i, label in zip(ids, labels, strict=True):
            tar.write({"__key__": key(i), "png" if i % 3 else "jpg": picture(i), "cls": str(label).encode()})
    data = path.read_bytes()
    roles = tuple(map(role, ids))
    return Shard(path.name, len(data), hashlib.sha256(data).hexdigest(), tuple(ids), tuple(labels), roles)


def config_of(folder: Path, epochs: int = 2, workers: int = 0, batch_size: int = 5, **changes: object) -> Config:
    settings = {
        "shards": str(folder), "image_size": SIZE, "mean": [0.5], "std": [0.5], "lanes": 4, "window": 1,
        "workers": workers,
    } | changes  # fmt: skip
    raw = {
        "name": "test",
        "epochs": epochs,
        "model": {"backbone": "small_cnn"},
        "data": settings,
        "batch": {"global_size": 16},
        "evaluation": {"batch_size": batch_size},
    }
    return parse_config(raw, "test")


@contextmanager
def streamed(data: Data, config: Config, *place: int, classes: int | None = None) -> Iterator[TrainStream]:
    """A stream; ``place`` is rank, world size and, if wanted, epoch and step."""
    wanted = data[1].class_ids("train")[:classes]
    with closing(TrainStream(data[1], wanted, config, *(place or (0, 1)))) as source:
        yield source


def batches(data: Data, config: Config, *place: int) -> list[TrainBatch]:
    with streamed(data, config, *place) as source:
        return list(source)


def joined(parts: list[list[TrainBatch]]) -> Iterator[tuple[int, int, torch.Tensor, list[int], list[int]]]:
    """The global batches, from those of every rank."""
    for step in zip(*parts, strict=True):
        for other in step[1:]:
            assert (other.epoch, other.step) == (step[0].epoch, step[0].step)
            assert torch.equal(other.labels_B, step[0].labels_B)
        images_B = torch.cat([batch.images_b for batch in step])
        ids = torch.cat([batch.ids_b for batch in step]).tolist()
        yield step[0].epoch, step[0].step, images_B, ids, step[0].labels_B.tolist()


def same(a: list[list[TrainBatch]], b: list[list[TrainBatch]]) -> bool:
    """Compare the global batches of two sets of ranks."""
    one, other = list(joined(a)), list(joined(b))
    return len(one) == len(other) and all(
        x[:2] == y[:2] and x[3:] == y[3:] and torch.equal(x[2], y[2]) for x, y in zip(one, other, strict=True)
    )
