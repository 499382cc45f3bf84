"""The stream gives the same batches for any number of ranks and decoding processes, from any step on.

Real tars, real decoding processes; each rank's stream is made in this process, one after the other.
"""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_obdsd.data.schedule import allowed_world_sizes
from dist_obdsd.data.stream import TrainBatch
from tests.data.shards import batches, config_of, examples, manifest_of, packed, same, write_shards

EPOCHS = 2
FOREIGN = [[0] * 9 + [1] * 3 + [2] * 5, [3] * 9, [1, 2, 4, 5, 6] * 2, [4, 4, 4, 5, 5, 6, 6, 7], [7] * 4 + [0, 3]]
"""Shards as another tool might have written them: uneven, a class in one shard alone, others strewn."""
SETS = {
    "packed": (packed([7, 9, 8, 12] * 4), (1, 2, 4, 8)),
    "packed for 3": (packed([7, 9, 8, 12] * 5, K=3, shards=6), (1, 2, 3, 6)),
    "foreign": (manifest_of(FOREIGN), (1, 2, 4)),
}
"""Manifests, and numbers of lanes that they have shards for."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    for name, (manifest, _) in SETS.items():
        write_shards(folder / name, manifest)
    return folder


def of_ranks(root: Path, which: tuple[str, int, str, int], world: int, *start: int, workers: int = 0) -> list:
    name, lanes, sampling, window = which
    manifest, K = SETS[name][0], SETS[name][0].samples_per_class
    small = {"image_size": 4, "channels": 1, "global_size": max(2, lanes) * K, "K": K}
    how = {"lanes": lanes, "sampling": sampling, "window": window, "workers": workers}
    config = config_of(root / name, EPOCHS, **small, **how)
    return [batches((root / name, manifest), config, rank, world, *start) for rank in range(world)]


REFERENCE: dict[tuple[str, int, str, int], list[TrainBatch]] = {}


@examples(12)
@given(st.data())
def test_any_ranks_any_workers_any_step(root: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(SETS)))
    K, choices = SETS[name][0].samples_per_class, SETS[name][1]
    lanes, sampling = data.draw(st.sampled_from(choices)), data.draw(st.sampled_from(["epoch", "released"]))
    which = (name, lanes, sampling, data.draw(st.integers(1, 3)))
    if which not in REFERENCE:
        (REFERENCE[which],) = of_ranks(root, which, 1)
    reference = REFERENCE[which]
    for batch in reference:
        assert sampling == "released" or len(batch.ids_b.unique()) == len(batch.ids_b)
        assert (batch.labels_B.reshape(-1, K) == batch.labels_B[::K, None]).all()
    assert len({tuple(batch.ids_b.tolist()) for batch in reference}) == len(reference)
    world = data.draw(st.sampled_from(allowed_world_sizes(lanes)))
    workers = data.draw(st.integers(0, 4 if world < 4 else 1))
    position = data.draw(st.integers(0, len(reference)))
    start = (reference[position].epoch, reference[position].step) if position < len(reference) else (EPOCHS, 0)
    assert same(of_ranks(root, which, world, *start, workers=workers), [reference[position:]])


def test_the_comparison_can_fail(root: Path) -> None:
    """The control: another order of the ranks, another sampling, a step too few are found."""
    which = ("packed", 2, "released", 1)
    reference = of_ranks(root, which, 1)
    assert not same(of_ranks(root, which, 2)[::-1], reference)
    assert not same(of_ranks(root, ("packed", 2, "epoch", 1), 1), reference)
    assert not same(of_ranks(root, which, 1, 0, 1), reference)
    # Some images come twice in an epoch, so the reader must have kept them.
    first = [i for batch in reference[0] if batch.epoch == 0 for i in batch.ids_b.tolist()]
    assert len(set(first)) < len(first)
