from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_obdsd.data import batch_composer
from dist_obdsd.data.class_uniform import ImageDeck, _cap, _fit, _round
from tests.data.schedules import all_classes, check_plan, examples, manifest_of, packed, plan_of


def spread(counts: list[int], sampling: str, epochs: int = 8, **options: int) -> tuple[float, Counter[int]]:
    """Chi-square of the classes' frequencies over the epochs, per degree of freedom, and how often each image came.

    It is 1 on average for classes drawn independently with equal probability.
    """
    manifest = packed(counts)
    classes, images = Counter[int](), Counter[int]()
    for epoch in range(epochs):
        plan = plan_of(manifest, epoch, sampling=sampling, **options)
        classes.update(plan.labels_SB[:, ::2].ravel().tolist())
        images.update(plan.ids_SB.ravel().tolist())
    seen_C = np.array([classes[c] for c in all_classes(manifest)])
    return float(((seen_C - seen_C.mean()) ** 2).sum() / seen_C.mean() / (len(seen_C) - 1)), images


OF_MANY_SIZES = np.clip(np.exp(np.random.default_rng(1).normal(2.5, 1.0, 300)), 2, 300).astype(int).tolist()


@pytest.mark.parametrize(
    ("counts", "options"),
    [
        ([20] * 200, {"lanes": 8, "window": 8}),
        ([20] * 200, {"lanes": 8, "window": 1}),
        (OF_MANY_SIZES, {"lanes": 8, "window": 8}),
        (OF_MANY_SIZES, {"lanes": 2, "window": 8}),
        ([300] * 5 + [3] * 200, {"lanes": 4, "window": 16}),
    ],
)
def test_classes_come_more_evenly_than_independent_draws_would(counts: list[int], options: dict[str, int]) -> None:
    chi, images = spread(counts, "class_uniform", global_size=64, **options)
    assert chi < 0.3
    # Images of a class likewise: none much more often than another.
    start = 0
    for n in counts:
        times = [images[i] for i in range(start, start + n)]
        assert max(times) - min(times) <= 8 + 0.2 * max(times)  # one more in an epoch, or in a lane with less to do
        start += n
    if len(set(counts)) > 1:  # the control
        assert spread(counts, "epoch", global_size=64, **options)[0] > 10


def test_a_large_batch_repeats_classes_but_no_image() -> None:
    manifest = manifest_of([[0] * 12 + [1] * 4 + [2] * 4] * 2)
    plan = plan_of(manifest, global_size=20, lanes=2, sampling="class_uniform")  # 10 groups, 3 classes
    check_plan(plan, manifest, 2, 2, 20, {0, 1, 2}, "class_uniform")
    groups = Counter(plan.labels_SB[:, ::2].ravel().tolist())
    assert plan.steps == 2
    assert sorted(groups) == [0, 1, 2]
    assert max(groups.values()) <= 8  # a third of 20 is 6.7, and each of the lanes rounds
    # Two images of a class in a lane are one group in a step, whatever its share: class 0 takes the rest.
    manifest = manifest_of([[0] * 12 + [1] * 2 + [2] * 2] * 2)
    plan = plan_of(manifest, global_size=16, lanes=2, sampling="class_uniform")
    check_plan(plan, manifest, 2, 2, 16, {0, 1, 2}, "class_uniform")
    assert [Counter(row) for row in plan.labels_SB[:, ::2].tolist()] == [Counter({0: 4, 1: 2, 2: 2})] * 2


def test_windows_too_small_for_a_step_are_put_together() -> None:
    manifest = manifest_of([[c, c] for c in range(12)])  # one group in each shard
    plan = plan_of(manifest, global_size=8, lanes=1, window=1, sampling="class_uniform")
    check_plan(plan, manifest, 2, 1, 8, set(range(12)), "class_uniform")
    assert [len(window) for window in plan.windows[0]] == [4, 4, 4]
    plan = plan_of(manifest, global_size=10, lanes=1, window=1, sampling="class_uniform")
    assert [len(window) for window in plan.windows[0]] == [5, 7]


def test_classes_without_k_images_in_a_window_are_left_out() -> None:
    manifest = manifest_of([[0, 0, 0, 0, 1, 2, 2], [0, 0, 1, 2, 2, 3]])
    plan = plan_of(manifest, global_size=4, lanes=2, sampling="class_uniform")
    assert set(plan.labels_SB.ravel().tolist()) == {0, 2}
    assert plan.too_small == 1  # class 3; class 1 has two images, in two shards of two lanes
    assert set(plan_of(manifest, global_size=4, lanes=1, sampling="class_uniform").labels_SB.ravel()) == {0, 1, 2}


def test_a_substitute_replaces_a_used_up_class() -> None:
    """Three planned groups of class 0 for a step that can have one of it."""
    planned = [batch_composer.Group(0, i / 3, 0, (), 0) for i in range(3)]
    lane = batch_composer.LaneQueue(planned, {(0, 0): 1, (0, 1): 1, (0, 2): 1})
    [[groups]] = batch_composer.take_steps([lane], 1, 3)
    assert sorted(group.label for group in groups) == [0, 1, 2]
    assert not any(lane.queues.values())


@examples(30)
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 6))
def test_shares_become_whole_numbers(seed: int, classes: int, lanes: int) -> None:
    random = np.random.default_rng(seed)
    images_CL = random.integers(0, 5, (classes, lanes)) * 1.0
    images_CL[0] += 1  # no lane without a class
    images_CL[:, 0] += 1  # no class without a lane
    wanted_CL = _fit(images_CL, 60)
    assert np.allclose(wanted_CL.sum(axis=0), 60)
    assert ((wanted_CL > 0) == (images_CL > 0)).all()
    shares_c = wanted_CL[:, 0]
    most_c = random.integers(1, 9, classes)
    total = int(min(60, most_c.sum()))
    capped_c = _cap(shares_c, most_c, total)
    assert np.isclose(capped_c.sum(), total)
    assert (capped_c <= most_c + 1e-9).all()
    counts_c = np.array([_round(capped_c, total, random) for _ in range(20)])
    assert (counts_c.sum(axis=1) == total).all()
    assert (np.abs(counts_c - capped_c) < 1 + 1e-9).all()


def test_equal_shares_where_the_lanes_allow_them() -> None:
    random = np.random.default_rng(0)
    images_CL = random.integers(1, 90, (40, 4)) * 1.0
    wanted_CL = _fit(images_CL, 100)
    assert np.allclose(wanted_CL.sum(axis=1), 10)


def test_images_come_in_turn() -> None:
    images = ImageDeck([1, 2, 3, 4, 5], np.random.default_rng(0))
    given = [images.take(2, step) for step in range(50)]
    assert all(len(set(pair)) == 2 for pair in given)
    assert set(Counter(i for pair in given for i in pair).values()) == {20}
    assert len(set(given)) > 10
    # Twice in one step: other images, as long as there are any.
    assert len(set(images.take(2, 50) + images.take(2, 50))) == 4
