"""What must hold of every schedule, over random manifests, settings, seeds and epochs.

``DIST_OBDSD_EXAMPLES=20 pytest tests/data/test_schedule_properties.py`` tries twenty times as many examples, new ones
in every run.
"""

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import event, given

from dist_obdsd.data.schedule import EpochPlan
from dist_obdsd.errors import InputError
from tests.data.schedules import Case, check_plan, examples, foreign_cases, packed_cases


def check_same_again(case: Case, plan: EpochPlan) -> None:
    again = case.plan()
    assert np.array_equal(plan.ids_SB, again.ids_SB)
    assert (plan.windows, plan.opens, plan.closes) == (again.windows, again.opens, again.closes)


@examples(30)
@given(packed_cases())
def test_packed_data_is_covered_with_any_lanes(case: Case) -> None:
    K, L, B = case.shape
    counts = Counter(c for s in case.manifest.splits["train"] for c in s.classes)
    reachable = sum(n // K * K for n in counts.values())
    if len(case.manifest.splits["train"]) < L or reachable < B:
        event("refused")
        with pytest.raises(InputError, match=r"training shards hold images|one lane has"):
            case.plan()
        return
    plan = case.plan()
    check_plan(plan, case.manifest, K, L, B, set(case.classes))
    check_same_again(case, plan)
    # 95 % of the whole batches, and so of the images but for what the last batch leaves over.
    assert plan.steps >= 0.95 * (reachable // B)
    if reachable >= 40 * B:
        event("covered")
        assert plan.coverage >= 0.95


@examples(40)
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
    check_plan(plan, case.manifest, K, L, B, set(case.classes))
    check_same_again(case, plan)
    shards = [shard for lane in plan.windows for window in lane for shard in window]
    event("lanes share a shard" if len(set(shards)) < len(shards) else "lanes of whole shards")
