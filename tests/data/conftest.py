from dataclasses import replace

import pytest

from dist_obdsd.data import remote
from dist_obdsd.data.packing.shard_assignment import assign_evenly
from tests.data.server import serving
from tests.data.shards import CLASSES, PER_CLASS, SHARDS, batches, config_of, packed, unwritten, write_shards


@pytest.fixture(autouse=True)
def _hurry(monkeypatch):
    """Downloads are tried again at once."""
    monkeypatch.setattr(remote, "PAUSE", 0.01)


@pytest.fixture
def server(tmp_path):
    """A server of a folder that is empty at first."""
    (tmp_path / "data").mkdir()
    with serving(tmp_path / "data") as running:
        yield running


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Shards to be read only; image i is of class i // PER_CLASS, and the classes 20 to 24 are for testing."""
    folder, train = tmp_path_factory.mktemp("shards"), packed([PER_CLASS] * CLASSES, shards=SHARDS)
    test = []
    for n, ids in enumerate(assign_evenly(range(20 * PER_CLASS, 25 * PER_CLASS), SHARDS, 0, "test")):
        labels, roles = [i // PER_CLASS for i in ids], ["query" if i % 2 else "gallery" for i in ids]
        test.append(unwritten(f"test-{n:06d}.tar", ids, labels, roles))
    manifest = replace(train, classes=tuple(map(str, range(25))), splits=train.splits | {"test": tuple(test)})
    return folder, write_shards(folder, manifest)


@pytest.fixture(scope="session")
def alone(data):
    """What one rank without decoding processes gives: the reference."""
    return batches(data, config_of(data[0]))
