"""The schedule: images of each global batch in row order, and their shards.

A pure function of (manifest, classes, seed, epoch, batch settings). It knows no ranks: the training shards are assigned
to a fixed number of *lanes*, and every step takes the same number of groups of K images of one class from every lane,
in lane order. A rank owns L/W consecutive lanes, so the global batches are the same for every number of ranks.

Letters: L lanes, B global rows, K images of one class in a group, G = B/K groups in a step, g = G/L of them from each
lane, S steps, W ranks, C classes.

A lane reads its shards in *windows* of a few. With sampling ``epoch`` the groups are those that the images of a window
make, each image in one at most; images left over may make a group with the next window. The m groups of a class in one
window get the times (i + u) / m, i = 0..m-1, with one random u per class. So every class is spread evenly over the
window, and the order is random all the same. A step takes the earliest groups whose classes it does not hold yet
(``batch_composer``). The lane with the fewest groups decides the number of steps.

With ``released`` every group is drawn by itself, as by the released code's ``class_random`` sampler: a class, each as
likely as any other, and K of its images, all with replacement. So a class may come several times in a batch, and an
image several times, even in one group. An epoch of n images has n // B steps. No window narrows the choice: every rank
reads the images of its rows from all shards, several times an epoch where these are more than all lanes' windows hold.
The random numbers are not the released code's, which draws from Python's global generator.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from dist_obdsd.data.batch_composer import Group, LaneQueue, Plan, take_steps
from dist_obdsd.data.lanes import ShardSlice, assign_to_lanes, shard_slices
from dist_obdsd.data.manifest import Manifest
from dist_obdsd.errors import InputError, require
from dist_obdsd.rng import rng

Sampling = Literal["epoch", "released"]
Windows = list[list[ShardSlice]]
"""The windows of one lane, in reading order."""
Steps = tuple[tuple[int, ...], ...]
"""A step for each window: lane -> window -> step."""


@dataclass(frozen=True)
class EpochPlan:
    """One epoch's global batches."""

    epoch: int
    ids_SB: np.ndarray
    """[S, B] int64 sample ids in global row order: lane by lane, K consecutive rows a group."""
    labels_SB: np.ndarray
    """[S, B] int64 class ids."""
    windows: tuple[tuple[tuple[int, ...], ...], ...]
    """Lane -> windows in reading order -> indices into the manifest's training shards. Two lanes may share a shard."""
    opens: Steps
    """The first step that uses an image of the window; S for a window that no step uses."""
    closes: Steps
    """The last such step; -1 for a window that no step uses."""
    reachable: int
    """Images that an epoch could show at best: the sum over the classes of K * floor(n_c / K); ``released``: all."""
    too_small: int
    """Number of classes that no batch of any epoch shows, having fewer than K images."""
    groups: int
    """G, groups in a batch."""

    @property
    def steps(self) -> int:
        return self.ids_SB.shape[0]

    @property
    def coverage(self) -> float:
        """Share of the reachable images that this epoch shows."""
        return len(np.unique(self.ids_SB)) / self.reachable

    @property
    def repeated(self) -> int:
        """Number of groups, over all steps, whose class stood in the step already."""
        return self.groups * self.steps - sum(len(set(row)) for row in self.labels_SB.tolist())

    @property
    def diversity(self) -> str:
        """Say how many distinct classes stand in a batch, on average and at most."""
        distinct = self.groups - self.repeated / self.steps
        most = min(self.groups, len(np.unique(self.labels_SB)))
        return f"{distinct:.1f} different classes in a batch on average; at most {most} are possible"


def allowed_world_sizes(lanes: int) -> list[int]:
    """List the numbers of ranks that divide the lanes."""
    return [n for n in range(1, lanes + 1) if lanes % n == 0]


def plan_epoch(
    manifest: Manifest, classes: list[int], *, seed: int, epoch: int, global_size: int, samples_per_class: int,
    lanes: int, window: int, sampling: Sampling = "epoch",
) -> EpochPlan:  # fmt: skip
    """Plan one epoch over the images of ``classes`` in the manifest's training shards.

    Args:
        global_size: B, rows in a global batch over all ranks.
        samples_per_class: K, images of one class in a group.
        lanes: L; the B/K groups of a step must divide evenly over them.
        window: shards in a window. A lane needs two neighbouring windows at a time, more only where one is used up
            before the largest class of the one before it.
        sampling: ``epoch`` or ``released``, see above.

    Raises:
        InputError: B, K and L do not divide, there are fewer shards than lanes, or fewer groups than one batch.
    """
    K, L = samples_per_class, lanes
    require("sampling", sampling, sampling in get_args(Sampling), "epoch or released")
    if global_size % (K * L):
        raise InputError(
            f"batch.global_size={global_size} does not divide into {L} lanes of groups of {K}; set it to a multiple of "
            f"{K * L}, or change data.lanes or batch.samples_per_class"
        )
    draw, slices = rng(seed, "schedule", epoch), shard_slices(manifest, classes, K)
    if sampling == "released":
        return _released_plan(slices, epoch, global_size, K, L, window, draw)
    per_lane = global_size // (K * L)
    if len(slices) < L:
        fitting = [n for n in range(1, len(slices) + 1) if (global_size // K) % n == 0]
        advice = f"set data.lanes to one of {fitting}" if fitting else "check the shards and validation"
        raise InputError(
            f"{len(slices)} training shards hold images of the chosen classes but data.lanes={L} needs as many at "
            f"least; {advice}, or pack the data into more shards"
        )
    counts_C = np.unique(np.concatenate([part.labels_n for part in slices]), return_counts=True)[1]
    reachable = int((counts_C // K).sum()) * K

    assigned = assign_to_lanes(slices, L, per_lane, K, draw)
    windows = [[lane[i : i + window] for i in range(0, len(lane), window)] for lane in assigned]
    groups = [_lane_groups(lane, K, draw) for lane in windows]
    fewest = min(map(len, groups))
    steps = fewest // per_lane
    if steps < 1:
        raise InputError(
            f"a batch of {global_size} takes {per_lane} groups of {K} images of one class from each of {L} lanes, but "
            f"one lane has {fewest} ({reachable} images can stand in groups at best); "
            + (f"set batch.global_size to at most {fewest * K * L}" if fewest else "set data.lanes=1")
            + f", use fewer data.lanes, or pack again with --samples-per-class {K}"
        )
    plan = take_steps([LaneQueue(lane) for lane in groups], steps, per_lane)
    ids_SB = np.array([[group.ids for lane in step for group in lane] for step in plan]).reshape(steps, global_size)
    labels_SG = np.array([[group.label for lane in step for group in lane] for step in plan], dtype=np.int64)
    opens, closes = _window_steps(plan, windows)
    return EpochPlan(
        epoch=epoch,
        ids_SB=ids_SB,
        labels_SB=np.repeat(labels_SG, K, axis=1),
        windows=tuple(tuple(tuple(part.shard for part in window) for window in lane) for lane in windows),
        opens=opens,
        closes=closes,
        reachable=reachable,
        too_small=len(set(classes)) - int((counts_C >= K).sum()),
        groups=global_size // K,
    )


def _released_plan(
    slices: list[ShardSlice], epoch: int, B: int, K: int, L: int, window: int, draw: np.random.Generator
) -> EpochPlan:
    """Draw classes and images with replacement."""
    n, groups = sum(len(part.ids_n) for part in slices), B // K
    steps = n // B
    if steps < 1:
        raise InputError(
            f"the training shards hold {n} images of the chosen classes but a batch takes {B}; set batch.global_size "
            f"to at most {n}, or check the shards and validation"
        )
    labels_n = np.concatenate([part.labels_n for part in slices])
    by_class_n = np.argsort(labels_n, kind="stable")
    labels_C, starts_C, counts_C = np.unique(labels_n[by_class_n], return_index=True, return_counts=True)
    drawn_SG = draw.integers(len(labels_C), size=(steps, groups))
    images_SGK = draw.integers(counts_C[drawn_SG][:, :, None], size=(steps, groups, K))
    images_SB = by_class_n[starts_C[drawn_SG][:, :, None] + images_SGK].reshape(steps, B)
    parts = min(steps, -(-len(slices) // (window * L)))
    ends = [steps * i // parts for i in range(parts + 1)]
    return EpochPlan(
        epoch=epoch,
        ids_SB=np.concatenate([part.ids_n for part in slices])[images_SB],
        labels_SB=labels_n[images_SB],
        windows=((tuple(part.shard for part in slices),) * parts,) * L,
        opens=(tuple(ends[:-1]),) * L,
        closes=(tuple(end - 1 for end in ends[1:]),) * L,
        reachable=n,
        too_small=0,
        groups=groups,
    )


def _lane_groups(windows: Windows, K: int, draw: np.random.Generator) -> list[Group]:
    """Make the groups of one lane; a window's left images may fill one in the next."""
    groups: list[Group] = []
    left: dict[int, list[int]] = {}
    for number, window in enumerate(windows):
        by_class = _by_class(window, draw)
        offsets = draw.random(len(by_class)).tolist()
        before, left = left, {}
        for (label, ids), u in zip(by_class.items(), offsets, strict=True):
            carried = before.get(label, [])
            pool = carried + ids  # the older images first, so that what is left over is of this window
            m = len(pool) // K
            for i in range(m):
                mixed = bool(carried) and i == 0  # comes early, so that the window before can be closed
                time, oldest = number + (i + (u / 2 if mixed else u)) / m, number - mixed
                groups.append(Group(number, time, label, tuple(pool[i * K : (i + 1) * K]), oldest))
            left[label] = pool[m * K :] if m else ids
    return groups


def _by_class(window: list[ShardSlice], draw: np.random.Generator) -> dict[int, list[int]]:
    """Sort the window's images by class, ascending, each class in random order."""
    ids_n = np.concatenate([part.ids_n for part in window])
    labels_n = np.concatenate([part.labels_n for part in window])
    order_n = draw.permutation(len(ids_n))
    order_n = order_n[np.argsort(labels_n[order_n], kind="stable")]
    labels_c, starts_c = np.unique(labels_n[order_n], return_index=True)
    ids = ids_n[order_n].tolist()
    starts = [*starts_c.tolist(), len(ids)]
    return {label: ids[a:b] for label, a, b in zip(labels_c.tolist(), starts, starts[1:], strict=False)}


def _window_steps(plan: Plan, windows: list[Windows]) -> tuple[Steps, Steps]:
    """Find the first and the last step that uses each window: lane -> window -> step."""
    opens = [[len(plan)] * len(lane) for lane in windows]
    closes = [[-1] * len(lane) for lane in windows]
    for t, step in enumerate(plan):
        for number, lane in enumerate(step):
            for used in {window for group in lane for window in (group.oldest, group.window)}:
                opens[number][used] = min(opens[number][used], t)
                closes[number][used] = t
    return tuple(map(tuple, opens)), tuple(map(tuple, closes))
