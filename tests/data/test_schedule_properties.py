"""What must hold of every schedule, over random manifests, settings, seeds and epochs.

``DIST_OBDSD_EXAMPLES=20 pytest tests/data/test_schedule_properties.py`` tries twenty times as many examples, new ones
in every run.
"""

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from dist_obdsd.data.lanes import ShardSlice
from dist_obdsd.data.schedule import EpochPlan, _lane_groups
from dist_obdsd.errors import InputError
from tests.data.schedules import (
    Case,
    check_plan,
    examples,
    foreign_cases,
    lane_counts,
    most_groups,
    most_open,
    packed_cases,
)


def check_same_again(case: Case, plan: EpochPlan) -> None:
    again = case.plan()
    assert np.array_equal(plan.ids_SB, again.ids_SB)
    assert (plan.windows, plan.opens, plan.closes) == (again.windows, again.opens, again.closes)


def check_memory(plan: EpochPlan, lanes: list[list[Counter[int]]], K: int, per_lane: int) -> None:
    """A lane never needs three windows at once, as long as a window outlasts the largest class of the one before."""
    for windows, opens, closes in zip(lanes, plan.opens, plan.closes, strict=True):
        groups = [sum(n // K for n in window.values()) for window in windows]
        largest = [max(window.values(), default=0) // K + 1 for window in windows]
        if all(following > per_lane * (most + 1) for most, following in zip(largest, groups[1:], strict=False)):
            assert most_open(plan.steps, opens, closes) <= 2


@examples(50)
@given(packed_cases())
def test_packed_data_is_covered_on_any_world_size(case: Case) -> None:
    K, L, B = case.shape
    counts = Counter(c for s in case.manifest.splits["train"] for c in s.classes)
    reachable = sum(n // K * K for n in counts.values())
    if len(case.manifest.splits["train"]) < L or reachable < B:
        event("refused")
        with pytest.raises(InputError, match=r"training shards hold images|one lane has"):
            case.plan()
        return
    plan = case.plan()
    check_plan(plan, case.manifest, K, L, B, set(case.classes), case.options["sampling"])
    check_same_again(case, plan)
    # 95 % of the whole batches, and so of the images but for what the last batch leaves over.
    assert plan.steps >= 0.95 * (reachable // B)
    if case.options["sampling"] == "epoch" and reachable >= 40 * B:
        event("covered")
        assert plan.coverage >= 0.95
    # Another epoch and another seed are another order.
    for other in ("epoch", "seed"):
        changed = case.plan(**{other: case.options[other] + 1})
        assert changed.steps < 3 or not np.array_equal(changed.ids_SB, plan.ids_SB)


@examples(60)
@given(foreign_cases())
def test_any_manifest_gives_a_sound_plan_or_a_clear_refusal(case: Case) -> None:
    try:
        plan = case.plan()
    except InputError as error:
        event("refused")
        if not re.search("training shards hold images|one lane has", str(error)):
            raise
        return
    K, L, B = case.shape
    check_plan(plan, case.manifest, K, L, B, set(case.classes), case.options["sampling"])
    check_same_again(case, plan)
    if case.options["sampling"] == "epoch":
        lanes = lane_counts(case, plan)
        check_memory(plan, lanes, K, B // K // L)
        # Exactly as many steps as the poorest lane can give, found by trying every way to make groups.
        assert plan.steps == min(most_groups(windows, K) for windows in lanes) * K * L // B
        assert plan.coverage == plan.steps * B / plan.reachable
        shards = [shard for lane in plan.windows for window in lane for shard in window]
        event("lanes share a shard" if len(set(shards)) < len(shards) else "lanes of whole shards")


@examples(60)
@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(1, 6), st.integers(1, 4))
def test_a_lane_makes_as_many_groups_as_can_be(seed: int, K: int, windows: int, classes: int) -> None:
    random = np.random.default_rng(seed)
    labels = [np.sort(random.integers(0, classes, random.integers(1, 4 * K))) for _ in range(windows)]
    starts = np.cumsum([0, *map(len, labels)])
    lane = [[ShardSlice(n, np.arange(starts[n], starts[n + 1]), found, K)] for n, found in enumerate(labels)]
    groups = _lane_groups(lane, K, random)
    ids = [i for group in groups for i in group.ids]
    assert len(set(ids)) == len(ids)
    assert len(groups) == most_groups([Counter(found.tolist()) for found in labels], K)
