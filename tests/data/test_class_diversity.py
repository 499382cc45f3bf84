import math

import numpy as np
import pytest

from dist_obdsd.data.class_diversity import Mixing, describe, mixing_of
from tests.data.schedules import manifest_of, packed, plan_of


def test_counts_and_expectation_on_a_small_plan() -> None:
    manifest = packed([8, 8, 4, 4, 12, 20] * 2, shards=8)
    plan = plan_of(manifest, global_size=16, lanes=4)
    mixing = mixing_of(plan, 2)
    assert mixing.distinct == np.mean([len(set(row)) for row in plan.labels_SB.tolist()])
    assert mixing.most == 8
    # The expectation against shuffles of the plan's own groups.
    groups, random = plan.labels_SB[:, ::2].ravel(), np.random.default_rng(0)
    drawn = [len(set(random.permutation(groups)[:8])) for _ in range(4000)]
    assert mixing.shuffled == pytest.approx(np.mean(drawn), abs=5 * np.std(drawn) / math.sqrt(len(drawn)))


def test_more_groups_than_classes_and_a_batch_that_is_the_epoch() -> None:
    plan = plan_of(manifest_of([[0, 0, 1, 1, 2, 2]] * 4), global_size=24, lanes=4)
    assert mixing_of(plan, 2) == Mixing(distinct=3.0, shuffled=3.0, most=3)


def test_data_with_the_sizes_of_omniglot_and_of_the_cars_part() -> None:
    for counts in ([20] * 964, [41] * 98):
        manifest = packed(counts)
        for lanes, window in ((8, 8), (8, 2), (4, 8)):
            plan = plan_of(manifest, global_size=112, lanes=lanes, window=window)
            assert mixing_of(plan, 2).share >= 0.95
    # The control: two shards at a time, with a dozen classes in them.
    narrow = mixing_of(plan_of(manifest, global_size=112, lanes=1, window=1), 2)
    assert narrow.share < 0.5
    assert narrow.distinct < 0.95 * narrow.shuffled


def test_one_line_for_people() -> None:
    line = describe(packed([20] * 100))
    assert line.startswith("class mixing: 56.0 distinct classes in a batch, 100.0% of the most possible (56;")
    assert "batches of 112 (2 per class, 8 lanes, windows of 8 shards)" in line
    assert "batches of 120 (5 per class" in describe(packed([20] * 100, K=5))
    assert "too few" in describe(packed([4] * 10))
    assert "no training images" in describe(manifest_of([]))
