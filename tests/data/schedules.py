"""Manifests without files, plans of them, and everything that must hold of a plan, counted from scratch."""

import os
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
from hypothesis import settings

from dist_obdsd.data.manifest import Manifest, Shard
from dist_obdsd.data.packing.shard_assignment import FEWEST_GROUPS, assign_training, shard_count
from dist_obdsd.data.schedule import EpochPlan, plan_epoch

LONG = int(os.environ.get("DIST_OBDSD_EXAMPLES", "1"))
"""Multiplies the number of examples of the property tests, which are then drawn anew in every run."""


def examples(n: int) -> settings:
    return settings(max_examples=n * LONG, deadline=None, derandomize=LONG == 1, print_blob=True)


def unwritten(file: str, ids: Sequence[int], labels: Sequence[int], roles: Sequence[str] = ()) -> Shard:
    """A shard without a file, of images to train on unless their roles are given."""
    return Shard(file, 1, "", tuple(ids), tuple(labels), tuple(roles) or ("train",) * len(ids))


def manifest_of(labels: Sequence[Sequence[int]], ids: Sequence[Sequence[int]] | None = None, K: int = 2) -> Manifest:
    """A manifest whose shard i holds images of the classes ``labels[i]``, with ids counted through by default."""
    starts = [0, *accumulate(map(len, labels))]
    ids = ids or [range(a, b) for a, b in pairwise(starts)]
    shards = zip(ids, labels, strict=True)
    train = tuple(unwritten(f"train-{n:06d}.tar", *shard) for n, shard in enumerate(shards))
    names = range(1 + max((label for shard in labels for label in shard), default=0))
    return Manifest({}, 0, K, tuple(map(str, names)), {"train": train})


def packed(counts: list[int], K: int = 2, seed: int = 0, shards: int | None = None) -> Manifest:
    """What ``pack`` makes of classes of ``counts`` images, all at least K; ``shards``: another number of them."""
    members = {label: range(a, b) for label, (a, b) in enumerate(pairwise([0, *accumulate(counts)]))}
    label_of = np.repeat(np.arange(len(counts)), counts).tolist()
    number = shards or shard_count(sum(n // K for n in counts), 20_000 * len(label_of), FEWEST_GROUPS)
    ids = assign_training(members, K, number, seed)
    return manifest_of([[label_of[i] for i in shard] for shard in ids], ids, K)


def plan_of(manifest: Manifest, epoch: int = 0, classes: list[int] | None = None, **changes: int | str) -> EpochPlan:
    wanted = list(range(len(manifest.classes))) if classes is None else classes
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
