"""The assignment of training shards to lanes, evenly. Letters as in ``schedule``."""

import numpy as np

from dist_obdsd.data.manifest import Manifest

MAX_LOSS = 0.02  # share of the steps that may be lost before two lanes share a shard


class ShardSlice:
    """The images that one lane takes from a shard: all wanted ones, or a part."""

    def __init__(self, shard: int, ids_n: np.ndarray, labels_n: np.ndarray, K: int) -> None:
        """``shard`` is an index into the manifest's training shards."""
        self.shard, self.ids_n, self.labels_n = shard, ids_n, labels_n
        self.groups = int((np.unique(labels_n, return_counts=True)[1] // K).sum())  # that these images make alone


Lanes = list[list[ShardSlice]]


def shard_slices(manifest: Manifest, classes: list[int], K: int) -> list[ShardSlice]:
    """List the images of some classes by training shard, where it has any."""
    wanted = np.zeros(len(manifest.classes), dtype=bool)
    wanted[classes] = True
    slices = []
    for index, shard in enumerate(manifest.splits.get("train", ())):
        labels_n = np.array(shard.classes, dtype=np.int64)
        keep_n = wanted[labels_n]
        if keep_n.any():
            slices.append(ShardSlice(index, np.array(shard.ids, dtype=np.int64)[keep_n], labels_n[keep_n], K))
    return slices


def assign_to_lanes(slices: list[ShardSlice], L: int, per_lane: int, K: int, draw: np.random.Generator) -> Lanes:
    """Assign shards to lanes at random, with group counts as equal as possible.

    The poorest lane decides the number of steps, so what others have beyond it is lost for the epoch.
    """
    lanes: Lanes = [[] for _ in range(L)]
    totals = [0] * L
    for i in draw.permutation(len(slices)).tolist():
        lane = min(range(L), key=lambda n: (totals[n], len(lanes[n]), n))
        lanes[lane].append(slices[i])
        totals[lane] += slices[i].groups
    _exchange_shards(lanes, totals)
    _share_shards(lanes, totals, per_lane, K, draw)
    return lanes


def _exchange_shards(lanes: Lanes, totals: list[int]) -> None:
    """Move or exchange shards between the richest and the poorest lane."""
    for _ in range(16 * len(lanes)):
        rich, poor = totals.index(max(totals)), totals.index(min(totals))
        gap = totals[rich] - totals[poor]
        given = np.array([part.groups for part in lanes[rich]])
        taken = np.array([0, *(part.groups for part in lanes[poor])])  # the 0 stands for giving without taking
        moved = given[:, None] - taken[None, :]
        if len(given) == 1:
            moved[:, 0] = 0  # a lane keeps its last shard
        remaining = np.abs(gap - 2 * moved)
        a, b = (int(i) for i in np.unravel_index(int(remaining.argmin()), remaining.shape))
        if remaining[a, b] >= gap:
            return
        totals[rich] -= int(moved[a, b])
        totals[poor] += int(moved[a, b])
        part = lanes[rich].pop(a)
        if b > 0:
            lanes[rich].insert(a, lanes[poor][b - 1])
            lanes[poor][b - 1] = part
        else:
            lanes[poor].append(part)


def _share_shards(lanes: Lanes, totals: list[int], per_lane: int, K: int, draw: np.random.Generator) -> None:
    """Let lanes share shards while more than MAX_LOSS of the steps would be lost.

    This happens where the shards are few or of unequal size.
    """
    fair = sum(totals) // len(lanes)
    while min(totals) // per_lane < (1 - MAX_LOSS) * (fair // per_lane):
        rich, poor = totals.index(max(totals)), totals.index(min(totals))
        known = {part.shard for part in lanes[poor]}
        place = max(range(len(lanes[rich])), key=lambda n: (lanes[rich][n].shard not in known, lanes[rich][n].groups))
        whole = lanes[rich][place]
        moving = min(totals[rich] - fair, fair - totals[poor], whole.groups)
        if moving < 1 or whole.shard in known:
            return
        stays, goes = _cut(whole, moving, K, draw)
        lanes[rich][place : place + 1] = [stays] if len(stays.ids_n) else []
        lanes[poor].append(goes)
        totals[rich] -= moving
        totals[poor] += moving


def _cut(whole: ShardSlice, groups: int, K: int, draw: np.random.Generator) -> tuple[ShardSlice, ShardSlice]:
    """Cut groups off, of whole classes if possible: (what stays, what goes)."""
    labels_c, counts_c = np.unique(whole.labels_n, return_counts=True)
    goes_n = np.zeros(len(whole.ids_n), dtype=bool)
    for c in draw.permutation(len(labels_c)).tolist():
        m = min(groups, int(counts_c[c]) // K)
        goes_n[np.flatnonzero(whole.labels_n == labels_c[c])[: m * K]] = True
        groups -= m
    stays, goes = (ShardSlice(whole.shard, whole.ids_n[keep], whole.labels_n[keep], K) for keep in (~goes_n, goes_n))
    return stays, goes
