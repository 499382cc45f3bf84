import numpy as np

from dist_obdsd.data.class_diversity import ClassDiversity, measure_diversity
from dist_obdsd.data.from_config import describe_diversity
from tests.data.schedules import manifest_of, packed, plan_of


def test_distinct_classes_are_counted() -> None:
    plan = plan_of(packed([8, 8, 4, 4, 12, 20] * 2, shards=8), global_size=16, lanes=4)
    found = measure_diversity(plan, 2)
    assert found.distinct == np.mean([len(set(row)) for row in plan.labels_SB.tolist()])
    assert found.most == 8
    # More groups than classes, and a batch that is the epoch.
    plan = plan_of(manifest_of([[0, 0, 1, 1, 2, 2]] * 4), global_size=24, lanes=4)
    assert measure_diversity(plan, 2) == ClassDiversity(distinct=3.0, most=3)


def test_one_line_for_people() -> None:
    line = describe_diversity(packed([20] * 100))
    assert "56.0 distinct classes in a batch, 100.0% of the most possible (56)" in line
    assert "batches of 112 (2 per class, 8 lanes, windows of 8 shards)" in line
    assert "batches of 120 (5 per class" in describe_diversity(packed([20] * 100, K=5))
    assert "too few" in describe_diversity(packed([4] * 10))
    assert "no training images" in describe_diversity(manifest_of([]))
