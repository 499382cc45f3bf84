import numpy as np
import pytest

from dist_obdsd.data import batch_composer, lanes
from dist_obdsd.errors import InputError
from tests.data.schedules import check_plan, manifest_of, packed, plan_of


def test_two_windows_of_a_lane_are_open_at_a_time() -> None:
    """With the sizes of the published benchmarks, most of whose images an epoch shows."""
    for counts in ([58 + i % 3 for i in range(100)], [20] * 964):
        plan = plan_of(packed(counts), global_size=112, lanes=8, window=8)
        assert plan.coverage >= 0.95
        for opens, closes in zip(plan.opens, plan.closes, strict=True):
            for step in range(plan.steps):
                assert sum(a <= step <= b for a, b in zip(opens, closes, strict=True)) <= 2


def test_lanes_share_a_shard_where_whole_ones_would_lose_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = manifest_of([list(range(40)) * 2, *[[0, 0, 1, 1, 2, 2, 3, 3]] * 3])  # 40 groups and three times 4
    plan = plan_of(manifest, global_size=8, lanes=4, window=1)
    check_plan(plan, manifest, 2, 4, 8, set(range(40)))
    assert plan.coverage == 1.0
    assert [sum(0 in window for lane in plan.windows for window in lane)] == [4]
    # 64 shards for 5 lanes: 13 for some and 12 for the others.
    packed_64 = packed([40] * 64)
    assert plan_of(packed_64, global_size=10, lanes=5).coverage > 0.98
    # Where whole shards do, no shard is read twice.
    windows = plan_of(packed_64, global_size=16, lanes=8).windows
    assert sum(len(window) for lane in windows for window in lane) == 64
    monkeypatch.setattr(lanes, "MAX_LOSS", 1.0)  # the control
    assert plan_of(manifest, global_size=8, lanes=4, window=1).coverage < 0.5
    assert plan_of(packed_64, global_size=10, lanes=5).coverage < 0.95


def test_a_class_repeats_only_when_it_must() -> None:
    three = manifest_of([[0, 0, 1, 1, 2, 2] * 8] * 4)
    plan = plan_of(three, global_size=16, lanes=4)  # 8 groups a step of 3 classes
    assert plan.repeated == plan.steps * 5
    eight = manifest_of([[c for c in range(8) for _ in range(8)]] * 4)
    assert plan_of(eight, global_size=16, lanes=4).repeated == 0  # every class in every step: nothing to spare


def test_lanes_exchange_classes_where_order_gets_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "MAX_LOSS", 1.0)
    # Lane of shard {0, 1} can give 1 instead of 0 and so leave 0 to the lane that has nothing else.
    manifest = manifest_of([[0] * 8, [0] * 8 + [1] * 8])
    repeats = [plan_of(manifest, epoch, global_size=4, lanes=2).repeated for epoch in range(20)]
    assert repeats == [0] * 20
    monkeypatch.setattr(batch_composer, "_exchange", lambda *_: False)  # the control
    assert sum(plan_of(manifest, epoch, global_size=4, lanes=2).repeated for epoch in range(20)) > 0


def test_every_epoch_is_another_and_the_remainders_rotate() -> None:
    manifest = packed([9] * 40, shards=16)
    plans = [plan_of(manifest, epoch) for epoch in range(12)]
    assert len({plan.ids_SB.tobytes() for plan in plans} | {plan_of(manifest, seed=1).ids_SB.tobytes()}) == 13
    assert len({plan.windows for plan in plans}) == 12
    seen = {i for plan in plans for i in plan.ids_SB.ravel().tolist()}
    assert len(seen) == 40 * 9  # 9 is odd: one of a class stays out of every epoch, not always the same
    assert all(plan.ids_SB.size < 40 * 9 for plan in plans)


def test_classes_are_spread_over_the_epoch() -> None:
    """A class with many images must not be left for the end, nor come all at once."""
    manifest = packed([80] * 4 + [8] * 60, shards=64)
    plan = plan_of(manifest, global_size=32, lanes=8, window=8)
    for label in range(4):
        steps = np.flatnonzero((plan.labels_SB == label).any(axis=1))
        thirds = np.histogram(steps, bins=3, range=(0, plan.steps))[0]
        assert thirds.min() >= 0.6 * thirds.mean()


def test_refusals_name_the_numbers() -> None:
    manifest = packed([8] * 20, shards=3)
    with pytest.raises(InputError, match=r"3 training shards .* data.lanes=4 .* \[1, 2\]"):
        plan_of(manifest)
    with pytest.raises(InputError, match=r"at most 20,"):
        plan_of(manifest_of([[0, 0, 1, 1, 2, 2, 3, 3, 4, 4]] * 2), global_size=80, lanes=2)
    with pytest.raises(InputError, match="does not divide into 4 lanes"):
        plan_of(manifest, global_size=34)
    with pytest.raises(InputError, match="0 training shards"):
        plan_of(manifest, classes=[])
    with pytest.raises(InputError, match="one lane has 0"):
        plan_of(manifest_of([list(range(10))] * 8), global_size=32, lanes=8, window=1)
    few = manifest_of([[0, 0, 1, 2, 2]] * 4)
    assert plan_of(few, global_size=8, classes=[0, 1, 2]).too_small == 0  # class 1 has four, in four shards
    assert plan_of(few, global_size=10, lanes=1, window=4, samples_per_class=5).too_small == 1
