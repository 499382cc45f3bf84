"""Sampling ``released``: classes and images drawn with replacement, as the released code draws them."""

from collections import Counter

import numpy as np
import pytest

from dist_obdsd.data.schedule import EpochPlan
from dist_obdsd.errors import InputError
from tests.data.schedules import manifest_of, packed, plan_of

CUB = [58 + i % 3 for i in range(100)]
SOP = [2 + i % 8 for i in range(11_318)]


def plans(counts: list[int], epochs: int = 1, sampling: str = "released") -> list[EpochPlan]:
    manifest = packed(counts)
    return [plan_of(manifest, epoch, global_size=112, lanes=8, window=8, sampling=sampling) for epoch in range(epochs)]


@pytest.mark.parametrize(("counts", "epochs"), [(CUB, 20), (SOP, 1)])
def test_batches_follow_the_law_of_independent_draws(counts: list[int], epochs: int) -> None:
    found = plans(counts, epochs)
    classes, B, G = len(counts), 112, 56
    assert {plan.steps for plan in found} == {sum(counts) // B}
    labels_SG = np.concatenate([plan.labels_SB[:, ::2] for plan in found])
    ids_SGK = np.concatenate([plan.ids_SB.reshape(plan.steps, G, 2) for plan in found])
    # Distinct classes in a batch: 43.0 with 100 classes, 55.9 with SOP's; of 56, so others repeat.
    distinct_S = np.array([len(set(row)) for row in labels_SG.tolist()])
    expected = classes * (1 - (1 - 1 / classes) ** G)
    assert abs(distinct_S.mean() - expected) < 4 * max(distinct_S.std(), 0.1) / len(distinct_S) ** 0.5
    # A pair is one image twice as often as 1 / n_c, on average over the classes.
    twice = (ids_SGK[:, :, 0] == ids_SGK[:, :, 1]).mean()
    expected = np.mean(1 / np.array(counts))
    assert abs(twice - expected) < 4 * (expected / ids_SGK.size * 2) ** 0.5
    # Every class is as likely as any other: chi-square per degree of freedom is 1 for independent draws.
    seen_C = np.bincount(labels_SG.ravel(), minlength=classes)
    chi = ((seen_C - seen_C.mean()) ** 2).sum() / seen_C.mean() / (classes - 1)
    assert abs(chi - 1) < 4 * (2 / (classes - 1)) ** 0.5


def test_epochs_of_each_image_once_do_not_pass_for_it() -> None:
    (plan,) = plans(CUB, sampling="epoch")
    assert plan.repeated == 0
    assert (plan.ids_SB[:, ::2] != plan.ids_SB[:, 1::2]).all()
    (plan,) = plans(CUB)
    assert plan.repeated > 10 * plan.steps
    assert "at most 56" in plan.diversity


def test_neither_shards_nor_lanes_nor_windows_narrow_the_choice() -> None:
    """Sorted by class, a shard a class: the same batches, and a window for each reading of all shards."""
    manifest = manifest_of([[c] * 9 for c in range(12)])
    whole, cut = (
        plan_of(manifest, global_size=12, lanes=lanes, window=window, sampling="released", classes=list(range(1, 12)))
        for lanes, window in ((1, 12), (2, 1))
    )
    assert np.array_equal(whole.ids_SB, cut.ids_SB)
    assert whole.steps == 11 * 9 // 12
    assert max(len(set(row)) for row in whole.labels_SB.tolist()) > 4
    assert [len(lane) for lane in whole.windows] == [1]
    assert [len(lane) for lane in cut.windows] == [6, 6]  # 11 shards, of which two windows of one hold 2
    assert set(cut.windows[0]) == {tuple(range(1, 12))}
    assert [*cut.opens[0], 8] == [0, *(step + 1 for step in cut.closes[0])]
    label_of = {i: c for s in manifest.splits["train"] for i, c in zip(s.ids, s.classes, strict=True)}
    assert [label_of[i] for i in whole.ids_SB.ravel()] == whole.labels_SB.ravel().tolist()


def test_a_class_of_one_image_is_drawn_and_too_few_are_refused() -> None:
    manifest = manifest_of([[0, 1, 1, 1], [2] * 4])
    one = {"global_size": 8, "lanes": 1, "sampling": "released"}
    drawn = [plan_of(manifest, n, **one).labels_SB[0, ::2].tolist() for n in range(200)]
    assert min(Counter(label for labels in drawn for label in labels).values()) > 200
    assert plan_of(manifest, **one).too_small == 0
    with pytest.raises(InputError, match="hold 8 images .* a batch takes 16; .* at most 8"):
        plan_of(manifest, **one | {"global_size": 16})
    with pytest.raises(InputError, match="hold 0 images"):
        plan_of(manifest, **one, classes=[])
