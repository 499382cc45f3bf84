"""The schedule: which images stand in which global batch, in which row, and which shards must be open for it.

A pure function of (manifest, classes, seed, epoch, batch settings). It knows no ranks: the training shards are dealt to
a fixed number of *lanes*, and every step takes the same number of groups of K images of one class from every lane, in
lane order. A rank owns L/W consecutive lanes, so the global batches are the same for every number of ranks.

Letters: L lanes, B global rows, K images of one class in a group, G = B/K groups in a step, g = G/L of them from each
lane, S steps, W ranks.

Within a lane, the m groups of a class in one window get the times (i + u) / m, i = 0..m-1, with one random u per class:
every class is spread evenly over the window, so no class is left for the end, and the order is random all the same. A
step takes the earliest groups whose classes it does not hold yet (``matching``).
"""

from dataclasses import dataclass

import numpy as np

from dist_obdsd.config import Config
from dist_obdsd.data.manifest import Manifest
from dist_obdsd.data.matching import Group, Lane, take_steps
from dist_obdsd.errors import InputError
from dist_obdsd.seeds import rng


@dataclass(frozen=True)
class EpochPlan:
    """One epoch's global batches."""

    epoch: int
    ids_SB: np.ndarray
    """[S, B] int64 sample ids in global row order: lane by lane, every K consecutive rows one group."""
    labels_SB: np.ndarray
    """[S, B] int64 class ids."""
    windows: tuple[tuple[tuple[int, ...], ...], ...]
    """Lane -> windows in reading order -> indices into the manifest's training shards."""
    opens: tuple[tuple[int, ...], ...]
    """Lane -> window -> the first step that uses an image of it; S for a window that no step uses."""
    closes: tuple[tuple[int, ...], ...]
    """Lane -> window -> the last step that uses an image of it; -1 for a window that no step uses."""
    reachable: int
    """Images that groups of K could cover at best: the sum over the classes of K * floor(n_c / K)."""
    repeated: int
    """How often, summed over the steps, a class had to stand in a step once more."""

    @property
    def steps(self) -> int:
        return self.ids_SB.shape[0]

    @property
    def coverage(self) -> float:
        """Share of the reachable images that this epoch shows."""
        return self.ids_SB.size / self.reachable


def allowed_world_sizes(lanes: int) -> list[int]:
    """The numbers of ranks that divide the lanes."""
    return [n for n in range(1, lanes + 1) if lanes % n == 0]


def lanes_of(rank: int, world_size: int, lanes: int) -> range:
    """The consecutive lanes of one rank.

    Raises:
        InputError: the number of ranks does not divide the number of lanes.
    """
    if lanes % world_size:
        raise InputError(
            f"{world_size} ranks do not divide data.lanes={lanes}; start one of {allowed_world_sizes(lanes)} ranks, or "
            f"set data.lanes to a multiple of {world_size} from the start of the run"
        )
    share = lanes // world_size
    return range(rank * share, (rank + 1) * share)


def plan_epoch(
    manifest: Manifest,
    classes: list[int],
    *,
    seed: int,
    epoch: int,
    global_size: int,
    samples_per_class: int,
    lanes: int,
    window: int,
) -> EpochPlan:
    """Plan one epoch over the images of ``classes`` in the manifest's training shards.

    Args:
        global_size: B, rows in a global batch over all ranks.
        samples_per_class: K, images of one class in a group.
        lanes: L; the B/K groups of a step must divide evenly over them.
        window: shards in a window. A lane needs at most two neighbouring windows at a time (more only where a window is
            used up before the largest class of the one before it).

    Raises:
        InputError: B, K and L do not divide, there are fewer shards than lanes, or fewer groups than one batch.
    """
    K, L = samples_per_class, lanes
    if global_size % (K * L):
        raise InputError(
            f"batch.global_size={global_size} does not divide into {L} lanes of groups of {K}; set it to a multiple of "
            f"{K * L}, or change data.lanes or batch.samples_per_class"
        )
    per_lane = global_size // (K * L)
    draw = rng(seed, "schedule", epoch)
    wanted = np.zeros(len(manifest.classes), dtype=bool)
    wanted[classes] = True
    shards = {}  # index -> (ids, labels) of the wanted images
    for index, shard in enumerate(manifest.splits.get("train", ())):
        labels = np.array(shard.classes, dtype=np.int64)
        keep = wanted[labels]
        if keep.any():
            shards[index] = (np.array(shard.ids, dtype=np.int64)[keep], labels[keep])
    if len(shards) < L:
        fitting = [n for n in range(1, len(shards) + 1) if (global_size // K) % n == 0]
        advice = f"set data.lanes to one of {fitting}" if fitting else "check the shards and validation"
        raise InputError(
            f"{len(shards)} training shards hold images of the chosen classes but data.lanes={L} needs as many at "
            f"least; {advice}, or pack the data into more shards"
        )
    counts_C = np.bincount(np.concatenate([labels for _, labels in shards.values()]), minlength=len(wanted))
    reachable = int((counts_C // K).sum()) * K

    sizes = {index: _groups_in(labels, K) for index, (_, labels) in shards.items()}
    dealt = _deal(sizes, L, draw)
    windows = tuple(tuple(tuple(lane[i : i + window]) for i in range(0, len(lane), window)) for lane in dealt)
    queues = [Lane(_lane_groups(lane, shards, K, draw)) for lane in windows]
    steps = min(queue.remaining for queue in queues) // per_lane
    if steps < 1:
        fewest = min(queue.remaining for queue in queues)
        raise InputError(
            f"a batch of {global_size} takes {per_lane} groups of {K} images of one class from each of {L} lanes, but "
            f"one lane has {fewest} ({reachable} images can stand in groups at best); "
            + (f"set batch.global_size to at most {fewest * K * L}" if fewest else "set data.lanes=1")
            + f", use fewer data.lanes, or pack again with --samples-per-class {K}"
        )
    plan = take_steps(queues, steps, per_lane)

    ids_SB = np.array([[i for lane in step for group in lane for i in group.ids] for step in plan], dtype=np.int64)
    labels_SG = np.array([[group.label for lane in step for group in lane] for step in plan], dtype=np.int64)
    opens = [[steps] * len(lane) for lane in windows]
    closes = [[-1] * len(lane) for lane in windows]
    for t, step in enumerate(plan):
        for number, lane in enumerate(step):
            for group in lane:
                for used in range(group.oldest, group.window + 1):
                    opens[number][used] = min(opens[number][used], t)
                    closes[number][used] = t
    return EpochPlan(
        epoch=epoch,
        ids_SB=ids_SB,
        labels_SB=np.repeat(labels_SG, K, axis=1),
        windows=windows,
        opens=tuple(map(tuple, opens)),
        closes=tuple(map(tuple, closes)),
        reachable=reachable,
        repeated=sum(len(row) - len(set(row)) for row in labels_SG.tolist()),
    )


def plan_from(config: Config, manifest: Manifest, classes: list[int], epoch: int) -> EpochPlan:
    """``plan_epoch`` with a config's settings."""
    return plan_epoch(
        manifest,
        classes,
        seed=config.seed,
        epoch=epoch,
        global_size=config.batch.global_size,
        samples_per_class=config.batch.samples_per_class,
        lanes=config.data.lanes,
        window=config.data.window,
    )


def _groups_in(labels: np.ndarray, K: int) -> int:
    return int((np.unique(labels, return_counts=True)[1] // K).sum())


def _deal(sizes: dict[int, int], L: int, draw: np.random.Generator) -> list[list[int]]:
    """Deal shards in random order, each to the lane with the fewest groups, then even the lanes out.

    The poorest lane decides the number of steps, so what others have beyond it is lost for the epoch. Moving one shard,
    or exchanging two, between the richest and the poorest lane is repeated while it brings them closer together.
    """
    dealt: list[list[int]] = [[] for _ in range(L)]
    totals = [0] * L
    for index in draw.permutation(np.array(list(sizes))).tolist():
        lane = min(range(L), key=lambda n: (totals[n], len(dealt[n]), n))
        dealt[lane].append(index)
        totals[lane] += sizes[index]
    for _ in range(16 * L):
        rich, poor = totals.index(max(totals)), totals.index(min(totals))
        gap = totals[rich] - totals[poor]
        mine = np.array([sizes[i] for i in dealt[rich]])
        theirs = np.array([0, *(sizes[i] for i in dealt[poor])])  # the 0 stands for giving without taking
        moved = mine[:, None] - theirs[None, :]
        if len(mine) == 1:
            moved[:, 0] = 0
        remaining = np.abs(gap - 2 * moved)
        a, b = np.unravel_index(int(remaining.argmin()), remaining.shape)
        if remaining[a, b] >= gap:
            break
        given = dealt[rich].pop(int(a))
        totals[rich] -= int(moved[a, b])
        totals[poor] += int(moved[a, b])
        if b > 0:
            dealt[rich].insert(int(a), dealt[poor][int(b) - 1])
            dealt[poor][int(b) - 1] = given
        else:
            dealt[poor].append(given)
    return dealt


def _lane_groups(
    windows: tuple[tuple[int, ...], ...],
    shards: dict[int, tuple[np.ndarray, np.ndarray]],
    K: int,
    draw: np.random.Generator,
) -> list[Group]:
    """The groups of one lane. Images that fill no group in their window may fill one in the next."""
    groups: list[Group] = []
    left: dict[int, list[int]] = {}
    for number, window in enumerate(windows):
        ids_n = np.concatenate([shards[i][0] for i in window])
        labels_n = np.concatenate([shards[i][1] for i in window])
        order_n = draw.permutation(len(ids_n))
        order_n = order_n[np.argsort(labels_n[order_n], kind="stable")]
        labels_c, starts_c = np.unique(labels_n[order_n], return_index=True)
        ids = ids_n[order_n].tolist()
        ends = [*starts_c.tolist()[1:], len(ids)]
        offsets = draw.random(len(labels_c)).tolist()
        before, left = left, {}
        for label, start, end, u in zip(labels_c.tolist(), starts_c.tolist(), ends, offsets, strict=True):
            carried = before.get(label, [])
            pool = carried + ids[start:end]  # the older images first, so that what is left over is of this window
            m = len(pool) // K
            if m:
                groups += [
                    Group(
                        window=number,
                        # Carried images go first, so that the window they are from can be closed.
                        time=number + (i + (u / 2 if carried and i == 0 else u)) / m,
                        label=label,
                        ids=tuple(pool[i * K : (i + 1) * K]),
                        oldest=number - 1 if carried and i == 0 else number,
                    )
                    for i in range(m)
                ]
                left[label] = pool[m * K :]
            else:
                left[label] = ids[start:end]
    return groups
