"""The stream gives the same batches for any number of ranks and decoding processes, from any step on.

Real tars, real decoding processes; each rank's stream is made in this process, one after the other.
"""

import hashlib
import io
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from webdataset import TarWriter

from dist_obdsd.config import Config, parse_config
from dist_obdsd.data.manifest import Manifest, key
from dist_obdsd.data.schedule import allowed_world_sizes
from dist_obdsd.data.stream import TrainStream
from tests.data.schedules import SAMPLINGS, all_classes, examples, manifest_of, packed

SIDE, EPOCHS = 4, 2
EVERY = SAMPLINGS | st.just("released")
FOREIGN = [[0] * 9 + [1] * 3 + [2] * 5, [3] * 9, [1, 2, 4, 5, 6] * 2, [4, 4, 4, 5, 5, 6, 6, 7], [7] * 4 + [0, 3]]
"""Shards as another tool might have written them: uneven, a class in one shard alone, others strewn."""
SETS = {
    "packed": (packed([7, 9, 8, 12] * 4), 2, (1, 2, 4, 8)),
    "packed for 3": (packed([7, 9, 8, 12] * 5, K=3, shards=6), 3, (1, 2, 3, 6)),
    "foreign": (manifest_of(FOREIGN), 2, (1, 2, 4)),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    for name, (manifest, _, _) in SETS.items():
        (folder / name).mkdir()
        for shard in manifest.splits["train"]:
            with TarWriter(str(folder / name / shard.file)) as tar:
                for i, label in zip(shard.ids, shard.classes, strict=True):
                    tar.write({"__key__": key(i), "png": picture(i), "cls": str(label).encode()})
    return folder


@cache
def picture(sample_id: int) -> bytes:
    pixels = np.random.default_rng(sample_id).integers(0, 256, (6, 5), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def config_of(root: Path, name: str, lanes: int, sampling: str, window: int, workers: int = 0) -> Config:
    K = SETS[name][1]
    raw = {
        "name": "test",
        "epochs": EPOCHS,
        "model": {"backbone": "small_cnn"},
        "data": {
            "shards": str(root / name), "image_size": SIDE, "channels": 1, "mean": [0.5], "std": [0.5],
            "lanes": lanes, "window": window, "workers": workers, "sampling": sampling,
        },
        "batch": {"samples_per_class": K, "global_size": max(2, lanes) * K},
    }  # fmt: skip
    return parse_config(raw, "test")


Seen = tuple[int, int, list[int], list[int], str]


def rank_steps(manifest: Manifest, config: Config, rank: int, world: int, start: tuple[int, int]) -> list[Seen]:
    """Per step: epoch, step, the rank's ids, the global batch's labels, a hash of each of the rank's images."""
    stream = TrainStream(manifest, all_classes(manifest), config, rank, world, *start)
    try:
        return [
            (
                batch.epoch,
                batch.step,
                batch.ids_b.tolist(),
                batch.labels_B.tolist(),
                " ".join(hashlib.md5(image.numpy().tobytes()).hexdigest() for image in batch.images_b),
            )
            for batch in stream
        ]
    finally:
        stream.close()


def global_steps(manifest: Manifest, config: Config, world: int, start: tuple[int, int] = (0, 0)) -> list[Seen]:
    """The global batches, put together from those of every rank."""
    ranks = [rank_steps(manifest, config, rank, world, start) for rank in range(world)]
    joined = []
    for parts in zip(*ranks, strict=True):  # as many steps on every rank
        epoch, step, _, labels, _ = parts[0]
        assert all((part[0], part[1], part[3]) == (epoch, step, labels) for part in parts)
        ids = [i for part in parts for i in part[2]]
        joined.append((epoch, step, ids, labels, " ".join(part[4] for part in parts)))
    return joined


REFERENCE: dict[tuple[object, ...], list[Seen]] = {}


@examples(12)
@given(st.data())
def test_any_ranks_any_workers_any_step(root: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(SETS)))
    manifest, K, choices = SETS[name]
    lanes, sampling, window = data.draw(st.sampled_from(choices)), data.draw(EVERY), data.draw(st.integers(1, 3))
    which = (name, lanes, sampling, window)
    if which not in REFERENCE:
        REFERENCE[which] = global_steps(manifest, config_of(root, *which), 1)
    reference = REFERENCE[which]
    for _, _, ids, labels, _ in reference:
        assert sampling == "released" or len(set(ids)) == len(ids)
        assert all(len(set(labels[i : i + K])) == 1 for i in range(0, len(labels), K))
    assert len({tuple(ids) for _, _, ids, _, _ in reference}) == len(reference)
    world = data.draw(st.sampled_from(allowed_world_sizes(lanes)))
    workers = data.draw(st.integers(0, 4 if world < 4 else 1))
    position = data.draw(st.integers(0, len(reference)))
    start = reference[position][:2] if position < len(reference) else (EPOCHS, 0)
    assert global_steps(manifest, config_of(root, *which, workers), world, start) == reference[position:]


def test_the_comparison_can_fail(root: Path) -> None:
    """The control: another order of the ranks, another sampling, a step too few are found."""
    manifest = SETS["packed"][0]
    config = config_of(root, "packed", 2, "class_uniform", 1)
    reference = global_steps(manifest, config, 1)
    ranks = [rank_steps(manifest, config, rank, 2, (0, 0)) for rank in (1, 0)]
    assert [a[2] + b[2] for a, b in zip(*ranks, strict=True)] != [step[2] for step in reference]
    assert global_steps(manifest, config_of(root, "packed", 2, "epoch", 1), 1) != reference
    assert global_steps(manifest, config, 1, (0, 1)) != reference
    # Some images come twice in an epoch, so the reader must have kept them.
    first = [i for epoch, _, ids, _, _ in reference if epoch == 0 for i in ids]
    assert len(set(first)) < len(first)
