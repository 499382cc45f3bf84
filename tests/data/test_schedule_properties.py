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

from dist_obdsd.data.manifest import Manifest
from dist_obdsd.data.schedule import EpochPlan
from dist_obdsd.errors import InputError
from tests.data.schedules import check_plan, examples, manifest_of, packed, plan_of

Case = tuple[Manifest, list[int], dict[str, int]]
"""A manifest, the classes to train on, and the settings of a plan."""


def options(draw: st.DrawFn, K: int, lanes: int) -> dict[str, int]:
    return {
        "samples_per_class": K, "lanes": lanes, "global_size": K * lanes * draw(st.integers(1, 4)),
        "window": draw(st.integers(1, 9)), "seed": draw(st.integers(0, 99)), "epoch": draw(st.integers(0, 9)),
    }  # fmt: skip


@st.composite
def packed_cases(draw: st.DrawFn) -> Case:
    """Assigned as ``pack`` does."""
    K, lanes = draw(st.integers(2, 8)), draw(st.integers(1, 16))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    spread, classes, seed = draw(st.sampled_from([0, 3, 30])), draw(st.integers(10, 250)), draw(st.integers(0, 3))
    counts = (K + draw(st.integers(0, 25)) + random.integers(0, spread + 1, classes)).tolist()
    return packed(counts, K, seed), list(range(classes)), options(draw, K, lanes)


@st.composite
def foreign_cases(draw: st.DrawFn) -> Case:
    """Classes of uneven size, strewn over shards of uneven size, or in the order of the classes."""
    K, lanes = draw(st.integers(2, 8)), draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    classes, largest = draw(st.integers(2, 40)), draw(st.integers(0, 160))
    shares = random.dirichlet(np.full(classes, draw(st.sampled_from([0.3, 1.0, 10.0]))))
    sizes = random.integers(0, largest + 1, draw(st.integers(lanes, lanes * 4)))
    drawn = [random.choice(classes, n, p=shares) for n in sizes]
    if draw(st.booleans()):  # sorted by class: one or two classes in a shard
        drawn = np.split(np.sort(np.concatenate(drawn)), np.cumsum(sizes)[:-1])
    manifest, every = manifest_of([shard.tolist() for shard in drawn]), draw(st.integers(2, 9))
    return manifest, [c for c in range(len(manifest.classes)) if c % every], options(draw, K, lanes)


def checked_plan(case: Case) -> EpochPlan:
    """A plan that is sound, and the same when it is made again."""
    manifest, classes, how = case
    plan, again = (plan_of(manifest, classes=classes, **how) for _ in range(2))
    check_plan(plan, manifest, how["samples_per_class"], how["lanes"], how["global_size"], set(classes))
    assert np.array_equal(plan.ids_SB, again.ids_SB)
    assert (plan.windows, plan.opens, plan.closes) == (again.windows, again.opens, again.closes)
    return plan


@examples(30)
@given(packed_cases())
def test_packed_data_is_covered_with_any_lanes(case: Case) -> None:
    manifest, _, how = case
    K, B = how["samples_per_class"], how["global_size"]
    counts = Counter(c for s in manifest.splits["train"] for c in s.classes)
    reachable = sum(n // K * K for n in counts.values())
    if len(manifest.splits["train"]) < how["lanes"] or reachable < B:
        event("refused")
        with pytest.raises(InputError, match=r"training shards hold images|one lane has"):
            checked_plan(case)
        return
    plan = checked_plan(case)
    # 95 % of the whole batches, and so of the images but for what the last batch leaves over.
    assert plan.steps >= 0.95 * (reachable // B)
    if reachable >= 40 * B:
        event("covered")
        assert plan.coverage >= 0.95


@examples(40)
@given(foreign_cases())
def test_any_manifest_gives_a_sound_plan_or_a_clear_refusal(case: Case) -> None:
    try:
        plan = checked_plan(case)
    except InputError as error:
        event("refused")
        if not re.search("training shards hold images|one lane has", str(error)):
            raise
        return
    shards = [shard for lane in plan.windows for window in lane for shard in window]
    event("lanes share a shard" if len(set(shards)) < len(shards) else "lanes of whole shards")
