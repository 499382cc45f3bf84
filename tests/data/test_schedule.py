"""Plans of chosen manifests, of any manifest, and, at the end, those of the sampling ``released``."""

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from dist_obdsd.data import batch_composer, lanes
from dist_obdsd.data.manifest import Manifest
from dist_obdsd.data.schedule import EpochPlan
from dist_obdsd.errors import InputError
from tests.data.shards import examples, manifest_of, packed, plan_of

CUB = [58 + i % 3 for i in range(100)]
SOP = [2 + i % 8 for i in range(11_318)]


def check_plan(plan: EpochPlan, manifest: Manifest, K: int, lanes: int, B: int, classes: set[int]) -> None:
    """Everything that must hold of every plan of the sampling ``epoch``."""
    label_of = {i: c for s in manifest.splits["train"] for i, c in zip(s.ids, s.classes, strict=True)}
    shard_of = {i: n for n, s in enumerate(manifest.splits["train"]) for i in s.ids}
    assert plan.ids_SB.shape == plan.labels_SB.shape == (plan.steps, B)
    assert plan.steps >= 1
    everything = plan.ids_SB.ravel().tolist()
    assert len(set(everything)) == len(everything)  # no image twice
    assert [label_of[i] for i in everything] == plan.labels_SB.ravel().tolist()
    assert {label_of[i] for i in everything} <= classes
    groups_SGK = plan.labels_SB.reshape(plan.steps, -1, K)
    assert (groups_SGK == groups_SGK[:, :, :1]).all()
    assert plan.repeated == sum(groups_SGK.shape[1] - len(set(row)) for row in groups_SGK[:, :, 0].tolist())
    # Each lane gives its own rows of every step from its own shards, within the steps in which their window is open.
    share = B // lanes
    lane_of: dict[int, int] = {}
    for lane, windows in enumerate(plan.windows):
        window_of = {shard: number for number, window in enumerate(windows) for shard in window}
        assert len(window_of) == sum(map(len, windows))  # a lane reads a shard once
        opens, closes = [plan.steps] * len(windows), [-1] * len(windows)
        for step in range(plan.steps):
            for i in plan.ids_SB[step, lane * share : (lane + 1) * share].tolist():
                number = window_of[shard_of[i]]
                opens[number], closes[number] = min(opens[number], step), step
                assert lane_of.setdefault(i, lane) == lane
        assert (tuple(opens), tuple(closes)) == (plan.opens[lane], plan.closes[lane])
    counts = Counter(c for c in label_of.values() if c in classes)
    assert plan.reachable == sum(n // K * K for n in counts.values())
    # A class that one lane has no K images of at a time still gives what windows allow, so not all can be promised.
    assert plan.steps <= plan.reachable // B
    assert plan.coverage == len(everything) / plan.reachable
    assert plan.too_small == sum(counts[c] < K for c in classes)


def test_two_windows_of_a_lane_are_open_at_a_time() -> None:
    """With the sizes of the published benchmarks, most of whose images an epoch shows."""
    for counts in (CUB, [20] * 964):
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
    assert [plan_of(manifest, epoch, global_size=4, lanes=2).repeated for epoch in range(20)] == [0] * 20
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


@pytest.mark.parametrize(
    ("labels", "how", "fact"),
    [
        ([[*range(8)] * 2] * 3, {}, r"3 training shards .* data.lanes=4 .* \[1, 2\]"),
        ([[0, 0, 1, 1, 2, 2, 3, 3, 4, 4]] * 2, {"global_size": 80, "lanes": 2}, "at most 20,"),
        ([[*range(8)] * 2] * 4, {"global_size": 34}, "does not divide into 4 lanes"),
        ([[*range(8)] * 2] * 4, {"classes": []}, "0 training shards"),
        ([list(range(10))] * 8, {"lanes": 8, "window": 1}, "one lane has 0"),
    ],
)
def test_refusals_name_the_numbers(labels: list[list[int]], how: dict, fact: str) -> None:
    with pytest.raises(InputError, match=fact):
        plan_of(manifest_of(labels), **how)


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


def released_plans(counts: list[int], epochs: int = 1, sampling: str = "released") -> list[EpochPlan]:
    manifest = packed(counts)
    return [plan_of(manifest, epoch, global_size=112, lanes=8, window=8, sampling=sampling) for epoch in range(epochs)]


@pytest.mark.parametrize(("counts", "epochs"), [(CUB, 20), (SOP, 1)])
def test_batches_follow_the_law_of_independent_draws(counts: list[int], epochs: int) -> None:
    found = released_plans(counts, epochs)
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
    (plan,) = released_plans(CUB, sampling="epoch")
    assert plan.repeated == 0
    assert (plan.ids_SB[:, ::2] != plan.ids_SB[:, 1::2]).all()
    (plan,) = released_plans(CUB)
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
