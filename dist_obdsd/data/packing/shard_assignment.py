"""The assignment of images to shards. Pure: numbers in, numbers out.

Legend: K samples per class; a group is K images of one class, which a batch takes together; a block is the part of a
class that goes to one shard.
"""

import heapq
from collections.abc import Mapping, Sequence

from dist_obdsd.rng import rng

BLOCK = 8  # images in a block, about: small enough to spread a class, large enough for several groups
MULTIPLE = 64  # so that the shards go evenly round up to 64 ranks
SHARD_BYTES = 64 * 2**20  # shards grow to about this size before there are more of them
FEWEST_GROUPS = 4  # per training shard
FEWEST_IMAGES = 16  # per test shard


def cut_blocks(images: int, k: int) -> list[int]:
    """Size the blocks of a class: near-equal, from K, multiples of K but for the rest.

    The sum of ``size // k`` over the blocks is ``images // k``: cutting loses no group.
    """
    groups, rest = divmod(images, k)
    count = min(groups, -(-images // max(BLOCK, k)))
    sizes = [k * (groups // count + (i < groups % count)) for i in range(count)]
    for i in range(rest):
        sizes[-1 - i % count] += 1  # the last blocks are the smaller ones
    return sorted(sizes, reverse=True)


def shard_count(units: int, total_bytes: int, fewest: int) -> int:
    """Choose a multiple of 64 shards, or a power of two, that gives each enough units.

    Args:
        units: groups or images in all.
        total_bytes: of all images; a large set gets more than 64 shards, of about SHARD_BYTES or more.
        fewest: units that a shard should have.
    """
    most = units // fewest
    if most >= MULTIPLE:
        wanted = max(1, total_bytes // (MULTIPLE * SHARD_BYTES))
        return MULTIPLE * min(wanted, most // MULTIPLE)
    return 1 << max(0, most.bit_length() - 1)


def assign_training(members: Mapping[int, Sequence[int]], k: int, shards: int, seed: int) -> list[list[int]]:
    """Assign whole blocks, so that an image has others of its class in its shard.

    Args:
        members: class id -> ids of its images, at least K.

    Returns:
        Per shard the ids of its images, shuffled. The shards' group counts differ by at most one.
    """
    blocks = []
    for class_id, ids in members.items():
        order = rng(seed, "pack images of a class", class_id).permutation(len(ids)).tolist()
        start = 0
        for size in cut_blocks(len(ids), k):
            blocks.append([ids[i] for i in order[start : start + size]])
            start += size
    shuffled = [blocks[i] for i in rng(seed, "pack blocks").permutation(len(blocks)).tolist()]
    # Largest blocks first, each to the shard with the fewest groups: the small ones then even out.
    assigned: list[list[list[int]]] = [[] for _ in range(shards)]
    heap = [(0, i) for i in range(shards)]
    for block in sorted(shuffled, key=lambda block: -(len(block) // k)):
        groups, i = heapq.heappop(heap)
        assigned[i].append(block)
        heapq.heappush(heap, (groups + len(block) // k, i))
    _level(assigned, k)
    return [_shuffle([i for block in shard for i in block], seed, "train", n) for n, shard in enumerate(assigned)]


def _level(shards: list[list[list[int]]], k: int) -> None:
    """Move groups from the fullest shard to the emptiest until they differ by one."""
    counts = [sum(len(block) // k for block in shard) for shard in shards]
    while max(counts) - min(counts) > 1:
        fullest, emptiest = counts.index(max(counts)), counts.index(min(counts))
        # Out of the largest block, of which K or more images stay behind.
        block = max(shards[fullest], key=len)
        if len(block) < 2 * k:
            shards[fullest].remove(block)
            shards[emptiest].append(block)
        else:
            shards[emptiest].append(block[-k:])
            del block[-k:]
        counts[fullest] -= 1
        counts[emptiest] += 1


def assign_evenly(ids: Sequence[int], shards: int, seed: int, split: str) -> list[list[int]]:
    """Assign shuffled images one by one; the shards' counts differ by one at most."""
    order = _shuffle(list(ids), seed, split, 0)
    return [order[i::shards] for i in range(shards)]


def _shuffle(ids: list[int], seed: int, split: str, shard: int) -> list[int]:
    return [ids[i] for i in rng(seed, "pack order", split, shard).permutation(len(ids)).tolist()]
