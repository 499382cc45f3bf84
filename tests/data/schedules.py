"""Manifests without files, and everything that must hold of a plan, counted from scratch."""

import os
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from dist_obdsd.data.manifest import Manifest, Shard
from dist_obdsd.data.packing.shard_assignment import FEWEST_GROUPS, assign_training, shard_count
from dist_obdsd.data.schedule import EpochPlan, plan_epoch

LONG = int(os.environ.get("DIST_OBDSD_EXAMPLES", "1"))
"""Multiplies the number of examples of the property tests, which are then drawn anew in every run."""


def examples(n: int) -> settings:
    return settings(max_examples=n * LONG, deadline=None, derandomize=LONG == 1, print_blob=True)


def manifest_of(shards: list[list[int]]) -> Manifest:
    """A manifest whose shard i holds images of the classes ``shards[i]``, with ids counted through."""
    made, next_id = [], 0
    for number, classes in enumerate(shards):
        ids = tuple(range(next_id, next_id + len(classes)))
        next_id += len(classes)
        made.append(Shard(f"train-{number:06d}.tar", 1, "", ids, tuple(classes), ("train",) * len(ids)))
    names = tuple(str(c) for c in range(1 + max((c for shard in shards for c in shard), default=0)))
    return Manifest({}, 0, 2, names, {"train": tuple(made)})


def packed(counts: list[int], K: int = 2, seed: int = 0, shards: int | None = None) -> Manifest:
    """What ``pack`` makes of classes of ``counts`` images, all at least K; ``shards``: another number of them."""
    starts = np.cumsum([0, *counts]).tolist()
    members = {label: list(range(a, b)) for label, (a, b) in enumerate(pairwise(starts))}
    label_of = np.repeat(np.arange(len(counts)), counts).tolist()
    number = shards or shard_count(sum(n // K for n in counts), 20_000 * len(label_of), FEWEST_GROUPS)
    assigned = assign_training(members, K, number, seed)
    made = tuple(
        Shard(f"train-{n:06d}.tar", 1, "", tuple(ids), tuple(label_of[i] for i in ids), ("train",) * len(ids))
        for n, ids in enumerate(assigned)
    )
    return Manifest({}, seed, K, tuple(map(str, range(len(counts)))), {"train": made})


def all_classes(manifest: Manifest) -> list[int]:
    return list(range(len(manifest.classes)))


def plan_of(manifest: Manifest, epoch: int = 0, classes: list[int] | None = None, **changes: int | str) -> EpochPlan:
    wanted = all_classes(manifest) if classes is None else classes
    options = {"seed": 0, "global_size": 32, "samples_per_class": 2, "lanes": 4, "window": 2} | changes
    return plan_epoch(manifest, wanted, epoch=epoch, **options)


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


@dataclass(frozen=True)
class Case:
    """A manifest and the settings of a plan."""

    manifest: Manifest
    classes: list[int]
    options: dict[str, int]

    @property
    def shape(self) -> tuple[int, int, int]:
        """K, L, B."""
        return self.options["samples_per_class"], self.options["lanes"], self.options["global_size"]

    def plan(self, **changes: int) -> EpochPlan:
        return plan_epoch(self.manifest, self.classes, **self.options | changes)


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
    return Case(packed(counts, K, seed), list(range(classes)), options(draw, K, lanes))


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
    return Case(manifest, [c for c in all_classes(manifest) if c % every], options(draw, K, lanes))
