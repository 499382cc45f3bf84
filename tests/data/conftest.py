from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dist_obdsd.data import remote
from dist_obdsd.data.manifest import Manifest, Shard, to_json
from dist_obdsd.data.stream import TrainBatch
from tests.data.server import Server, serving
from tests.data.shards import CLASSES, PER_CLASS, SHARDS, Data, batches, config_of, write_shard


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloads are tried again at once."""
    monkeypatch.setattr(remote, "PAUSE", 0.01)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server of a folder that is empty at first."""
    (tmp_path / "data").mkdir()
    with serving(tmp_path / "data") as running:
        yield running


def _write(folder: Path, split: str, classes: range, role: Callable[[int], str]) -> tuple[Shard, ...]:
    """Write a split; each class's images in pairs over the shards."""
    pairs = [(label, label * PER_CLASS + i) for label in classes for i in range(0, PER_CLASS, 2)]
    order = np.random.default_rng(0).permutation(len(pairs))
    shards = []
    for n in range(SHARDS):
        labels, ids = zip(*((pairs[i][0], pairs[i][1] + j) for i in order[n::SHARDS] for j in (0, 1)), strict=True)
        shards.append(write_shard(folder / f"{split}-{n:06d}.tar", ids, labels, role))
    return tuple(shards)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Shards to be read only."""
    folder = tmp_path_factory.mktemp("shards")
    splits = {
        "train": _write(folder, "train", range(CLASSES), lambda i: "train"),
        "test": _write(folder, "test", range(20, 25), lambda i: "query" if i % 2 else "gallery"),
    }
    manifest = Manifest({}, 0, 2, tuple(map(str, range(25))), splits)
    (folder / "manifest.json").write_text(to_json(manifest))
    return folder, manifest


@pytest.fixture(scope="session")
def alone(data: Data) -> list[TrainBatch]:
    """What one rank without decoding processes gives: the reference."""
    return batches(data, config_of(data[0]))
