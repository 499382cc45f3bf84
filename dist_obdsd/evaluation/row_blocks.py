"""All ranks' rows by ascending id, cut into blocks whose size depends on their number alone.

Sums over the rows are taken block by block and added up in the order of the blocks. So they are the same for any number
of ranks and any distribution of the images. Block i is on rank i modulo the world size.

Shapes: n rows of this rank, N of all ranks, r rows of a block, D columns.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dist_obdsd.distributed import collectives

BLOCKS = 8
"""Blocks that the rows are cut into."""


@dataclass(frozen=True)
class RowBlocks:
    """This rank's blocks of all ranks' rows."""

    own: dict[int, torch.Tensor]
    """Number of a block -> its rows [r, D]."""
    N: int
    D: int
    device: torch.device

    @property
    def size(self) -> int:
        """Rows of every block but the last ones."""
        return max(1, -(-self.N // BLOCKS))

    def sum(self, of_rows: Callable[[int, torch.Tensor], torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
        """Add up ``of_rows(number, rows)`` of all blocks, float64 tensors of one shape, in their order. Collective."""
        total = torch.zeros(shape, dtype=torch.float64, device=self.device)
        for number in range(BLOCKS):
            part = torch.zeros_like(total)
            if number in self.own:
                part.copy_(of_rows(number, self.own[number]))
            collectives.broadcast_([part], source=number % collectives.world_size())
            total += part
        return total

    def gather(self, of_blocks: dict[int, torch.Tensor]) -> torch.Tensor:
        """Put one number a row, by block, together: [N], by ascending id. Collective."""
        values_N = torch.zeros(self.N, dtype=torch.float64, device=self.device)
        for number, values_r in of_blocks.items():
            values_N[number * self.size : number * self.size + len(values_r)] = values_r.double()
        return collectives.sum_across(values_N)


def build_row_blocks(rows_nD: torch.Tensor, place_n: torch.Tensor) -> RowBlocks:
    """Send every block's rows to its rank. Collective.

    Args:
        place_n: each row's place by ascending id among those of all ranks, each once.
    """
    blocks = RowBlocks({}, sum(collectives.gather_json(len(place_n))), rows_nD.shape[1], rows_nD.device)
    found = gather_blocks(rows_nD, place_n, place_n // blocks.size)
    blocks.own.update({number: rows_rD for number, (rows_rD, _) in found.items()})
    return blocks


def gather_blocks(
    rows_nD: torch.Tensor, place_n: torch.Tensor, block_n: torch.Tensor
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Bring the rows of a block together on one rank: this rank's blocks as (rows [r, D], places [r]). Collective.

    Args:
        place_n: what the rows of a block are sorted by.
        block_n: each row's block, 0..BLOCKS-1.
    """
    place_n, block_n = place_n.to(rows_nD.device), block_n.to(rows_nD.device)
    own = {}
    for number in range(BLOCKS):
        inside_n = block_n == number
        place_r, rows_rD = (collectives.gather_ragged(x[inside_n]) for x in (place_n, rows_nD))
        if number % collectives.world_size() == collectives.rank():
            place_r, order_r = place_r.sort()
            own[number] = rows_rD[order_r], place_r
    return own
