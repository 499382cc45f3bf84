"""One rank's view of the global batch, and its share of a mean over it.

Legend: b rows of this rank, B rows of the global batch, D embedding dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch

from dist_obdsd.manifold.similarity import similarity

Note = tuple[str, torch.Tensor]
"""A sentence with a gap for a number, and the number: how many of this rank's entries are wrong, on the device."""


@dataclass(frozen=True)
class BatchView:
    """One global batch as one rank sees it."""

    E_bD: torch.Tensor
    """Unit rows of this rank."""
    E_BD: torch.Tensor
    """Unit rows of all ranks, in rank order, with gradient."""
    labels_B: torch.Tensor
    """int64 class indices, 0 to C-1 among the training classes."""
    first_row: int
    """Index of this rank's first row in the batch."""
    seed: int = 0
    """Seed of this step's random choices; the same on every rank."""
    shared: Callable[[torch.Tensor], torch.Tensor] = lambda parameter: parameter
    """Wraps a parameter of the loss so that its gradient is averaged over the ranks; use the result."""
    notes: list[Note] = field(default_factory=list)
    """What may be wrong with its numbers, which travels with the loss."""

    @property
    def b(self) -> int:
        return self.E_bD.shape[0]

    @property
    def B(self) -> int:
        return self.E_BD.shape[0]

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.first_row + self.b)

    @property
    def labels_b(self) -> torch.Tensor:
        return self.labels_B[self.rows]

    @property
    def world_size(self) -> int:
        return self.B // self.b

    @cached_property
    def S_bB(self) -> torch.Tensor:
        """Similarities of own rows to all, made once, so that backward runs once."""
        return similarity(self.E_bD, self.E_BD)

    def positives_negatives(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Make masks [b, B] of the anchor's class but itself, and of other classes.

        The anchor is left out by its index, so that a duplicate image stays a positive.
        """
        same_bB = self.labels_b[:, None] == self.labels_B
        negative_bB = ~same_bB
        same_bB.diagonal(offset=self.first_row).fill_(False)
        return same_bB, negative_bB


@dataclass(frozen=True)
class PartialMean:
    """This rank's share of a mean: (sum over the ranks) / (count over the ranks)."""

    sum: torch.Tensor
    """Scalar."""
    count: torch.Tensor
    """Scalar of the same dtype and device, without gradient."""
