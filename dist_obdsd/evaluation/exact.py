"""Sums that no order can change: numbers become integers, and sums of integers are exact.

A float sum depends on the order of its terms, so on the ranks, on the blocks and on which image lies where. Here every
term is rounded once, on its own, to a multiple of one fixed step; int64 sums of those have the same bits for any
number of ranks and any distribution of the images.

Shapes: n rows of this rank, k groups, D columns.
"""

import math

import torch

from dist_obdsd.distributed import collectives

LIMB = 15  # bits; a product of two limbs has 30, so 2^22 of them add up exactly in float64
LIMB_ROWS = 1 << 22


class FixedPoint:
    """Multiples of one step, as int64, such that ``count`` terms of size up to ``largest`` cannot overflow.

    The step is about ``largest * 2^-(61 - log2 count)``: for a million terms, 12 decimal digits below the largest.
    """

    def __init__(self, largest: float, count: int) -> None:
        _, exponent = math.frexp(largest)  # largest <= 2^exponent
        self.scale = 2.0 ** max(-1000, min(1000, 62 - exponent - max(count, 1).bit_length()))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return (x.double() * self.scale).round_().long()

    def decode(self, total: torch.Tensor) -> torch.Tensor:
        return total.double() / self.scale


def largest_entry(rows_nD: torch.Tensor) -> float:
    """The largest absolute value on all ranks; 0 where there is none. Collective."""
    return max(collectives.gather_json(float(rows_nD.abs().max()) if rows_nD.numel() else 0.0))


def group_means(rows_nD: torch.Tensor, group_n: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(means [k, D] float64, sizes [k]) of the rows of all ranks by group 0..k-1; empty groups have mean 0. Collective.

    The same bits on every rank, for any distribution of the rows.
    """
    sizes_k = collectives.sum_across(torch.bincount(group_n, minlength=k))
    number = FixedPoint(largest_entry(rows_nD), int(sizes_k.max()))
    own_kD = torch.zeros(k, rows_nD.shape[1], dtype=torch.int64, device=rows_nD.device)
    total_kD = collectives.sum_across(own_kD.index_add_(0, group_n, number.encode(rows_nD)))
    return number.decode(total_kD) / sizes_k.clamp(min=1)[:, None], sizes_k


def gram(rows_nD: torch.Tensor) -> torch.Tensor:
    """X^T X [D, D] float64 over the rows X of all ranks, with entries rounded to 2^-30 of the largest. Collective.

    Rounded entries are split into two limbs of 15 bits; matrix products of limbs stay below 2^53, so float64 holds them
    exactly whatever order the library adds in.
    """
    _, exponent = math.frexp(largest_entry(rows_nD))
    scale = 2.0 ** max(-1000, min(1000, 2 * LIMB - exponent))
    D = rows_nD.shape[1]
    own_3DD = torch.zeros(3, D, D, dtype=torch.int64, device=rows_nD.device)
    for rows in rows_nD.split(LIMB_ROWS):
        whole = (rows.double() * scale).round_().long()
        high = whole >> LIMB
        low = (whole - (high << LIMB)).double()
        high = high.double()
        own_3DD += torch.stack([high.T @ high, high.T @ low, low.T @ low]).long()
    high_DD, mixed_DD, low_DD = collectives.sum_across(own_3DD).double()
    total = high_DD * 2.0 ** (2 * LIMB) + (mixed_DD + mixed_DD.T) * 2.0**LIMB + low_DD
    return total / scale / scale
