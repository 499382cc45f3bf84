"""Dealing shards to lanes, evenly. Letters as in ``schedule``."""

from dataclasses import dataclass

import numpy as np

from dist_obdsd.data.manifest import Manifest

UNEVEN = 0.02  # share of the steps that may be lost before two lanes share a shard


@dataclass(frozen=True)
class Piece:
    """What one lane has of a shard: all that is wanted of it, or a part where lanes share it."""

    shard: int
    """Index into the manifest's training shards."""
    ids_n: np.ndarray
    labels_n: np.ndarray
    groups: int
    """That its images make by themselves."""

    @classmethod
    def of(cls, shard: int, ids_n: np.ndarray, labels_n: np.ndarray, K: int) -> "Piece":
        return cls(shard, ids_n, labels_n, groups_in(labels_n, K))


def groups_in(labels_n: np.ndarray, K: int) -> int:
    """How many groups of K images of one class there are."""
    return int((np.unique(labels_n, return_counts=True)[1] // K).sum())


def pieces_of(manifest: Manifest, classes: list[int], K: int) -> list[Piece]:
    """What the training shards hold of the classes; shards that hold nothing of them are left out."""
    wanted = np.zeros(len(manifest.classes), dtype=bool)
    wanted[classes] = True
    pieces = []
    for index, shard in enumerate(manifest.splits.get("train", ())):
        labels_n = np.array(shard.classes, dtype=np.int64)
        keep_n = wanted[labels_n]
        if keep_n.any():
            pieces.append(Piece.of(index, np.array(shard.ids, dtype=np.int64)[keep_n], labels_n[keep_n], K))
    return pieces


def deal_lanes(pieces: list[Piece], L: int, per_lane: int, K: int, draw: np.random.Generator) -> list[list[Piece]]:
    """Deal shards in random order, each to the lane with the fewest groups, then even the lanes out.

    The poorest lane decides the number of steps, so what others have beyond it is lost for the epoch. Moving one shard,
    or exchanging two, between the richest and the poorest lane is repeated while it brings them closer together. Where
    that still loses more than UNEVEN of the steps, because the shards are few or of unequal size, lanes share shards.
    Each of them then reads the whole shard.

    Args:
        per_lane: g, groups that a step takes from a lane.
    """
    dealt: list[list[Piece]] = [[] for _ in range(L)]
    totals = [0] * L
    for n in draw.permutation(len(pieces)).tolist():
        lane = min(range(L), key=lambda n: (totals[n], len(dealt[n]), n))
        dealt[lane].append(pieces[n])
        totals[lane] += pieces[n].groups
    for _ in range(16 * L):
        rich, poor = totals.index(max(totals)), totals.index(min(totals))
        gap = totals[rich] - totals[poor]
        mine = np.array([piece.groups for piece in dealt[rich]])
        theirs = np.array([0, *(piece.groups for piece in dealt[poor])])  # the 0 stands for giving without taking
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
    fair = sum(totals) // L
    while min(totals) // per_lane < (1 - UNEVEN) * (fair // per_lane):
        rich, poor = totals.index(max(totals)), totals.index(min(totals))
        known = {piece.shard for piece in dealt[poor]}
        place = max(range(len(dealt[rich])), key=lambda n: (dealt[rich][n].shard not in known, dealt[rich][n].groups))
        whole = dealt[rich][place]
        moving = min(totals[rich] - fair, fair - totals[poor], whole.groups)
        if moving < 1 or whole.shard in known:
            break
        stays, goes = _cut(whole, moving, K, draw)
        dealt[rich][place : place + 1] = [stays] if len(stays.ids_n) else []
        dealt[poor].append(goes)
        totals[rich] -= moving
        totals[poor] += moving
    return dealt


def _cut(piece: Piece, groups: int, K: int, draw: np.random.Generator) -> tuple[Piece, Piece]:
    """Cut ``groups`` groups off, of whole classes as far as possible: (what stays, what goes)."""
    labels_c, counts_c = np.unique(piece.labels_n, return_counts=True)
    goes_n = np.zeros(len(piece.ids_n), dtype=bool)
    for c in draw.permutation(len(labels_c)).tolist():
        m = min(groups, int(counts_c[c]) // K)
        goes_n[np.flatnonzero(piece.labels_n == labels_c[c])[: m * K]] = True
        groups -= m
    return (
        Piece.of(piece.shard, piece.ids_n[~goes_n], piece.labels_n[~goes_n], K),
        Piece.of(piece.shard, piece.ids_n[goes_n], piece.labels_n[goes_n], K),
    )
