"""What every part of the objective shares: the share of a mean that one rank holds, and similarities.

Legend: b rows of this rank, B rows of the global batch, D embedding dimension.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from dist_obdsd.errors import InputError

LOG2_E = math.log2(math.e)
"""e^x is 2^(x LOG2_E), and torch's exp2 takes a third of the time of its exp on a CPU."""
LEAST_EXPONENT = -115.0
"""Of 2; what is below it may be taken for it: 2e-35 changes no sum, and what is smaller makes a CPU slow."""


@dataclass(frozen=True)
class BatchView:
    """One global batch as one rank sees it."""

    E_bD: torch.Tensor
    """Unit rows of this rank."""
    E_BD: torch.Tensor
    """Those of all ranks, in rank order, with gradient."""
    labels_B: torch.Tensor
    """int64 class indices, 0 to C-1 among the training classes."""
    first_row: int
    """Where this rank's rows begin in the batch."""
    seed: int = 0
    """Of this step's random choices; the same on every rank."""

    def __post_init__(self) -> None:
        """Check the shapes, which are known without waiting for a GPU.

        Raises:
            InputError: naming the shape found and the one needed.
        """
        check_rows("labels_B", self.labels_B, self.B, 1)
        if self.first_row % self.b or not 0 <= self.first_row <= self.B - self.b or self.B % self.b:
            raise InputError(
                f"first_row is {self.first_row} with {self.b} of {self.B} rows; it must be a multiple of {self.b} "
                f"within the batch"
            )

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
        """Similarities of own rows to all, with gradient: made once, so that their backward runs once, too."""
        return similarity(self.E_bD, self.E_BD)

    def share(self, n: int) -> slice:
        """This rank's part of n things, near-equal over the ranks."""
        rank, W = self.first_row // self.b, self.world_size
        return slice(rank * n // W, (rank + 1) * n // W)

    def positives_negatives(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks [b, B]: of the anchor's class without the anchor itself, and of another class.

        The anchor is left out by its index, so that a duplicate image stays a positive.
        """
        same_bB = self.labels_b[:, None] == self.labels_B
        negative_bB = ~same_bB
        same_bB.diagonal(offset=self.first_row).fill_(False)
        return same_bB, negative_bB


@dataclass(frozen=True)
class PartialMean:
    """This rank's share of a mean over the global batch. The mean is (sum over the ranks) / (count over the ranks)."""

    sum: torch.Tensor
    """Scalar."""
    count: torch.Tensor
    """Scalar of the same dtype and device, without gradient."""


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which autocast has no say; entering torch's own takes longer than most operations inside."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def similarity(X_bD: torch.Tensor, Y_BD: torch.Tensor) -> torch.Tensor:
    """Inner products [b, B], cosines for unit rows, in float32 or, if a factor is float64, in float64.

    Autocast is off inside, and half precision is widened first: at temperature 0.005 the rounding of a bfloat16 product
    would move a logit by up to 0.8.
    """
    with without_autocast(X_bD.device):
        dtype = torch.promote_types(torch.promote_types(X_bD.dtype, Y_BD.dtype), torch.float32)
        if X_bD is Y_BD and X_bD.requires_grad:
            return _Gram.apply(X_bD.to(dtype))
        return X_bD.to(dtype) @ Y_BD.to(dtype).T


class _Gram(torch.autograd.Function):
    """X X^T, whose gradient (G + G^T) X takes one product; for two factors that happen to be the same it takes two."""

    @staticmethod
    def forward(ctx: Any, X_BD: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(X_BD)
        return X_BD @ X_BD.T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (X_BD,) = ctx.saved_tensors
        with without_autocast(X_BD.device):
            return (grads[0] + grads[0].T) @ X_BD


def check_rows(what: str, tensor: torch.Tensor, rows: int, dims: int) -> None:
    """Check a tensor's number of rows and of dimensions, which are known without waiting for a GPU.

    Raises:
        InputError: naming the shape found and the one needed.
    """
    if tensor.dim() != dims or tensor.shape[0] != rows:
        needed = f"({rows}, D)" if dims == 2 else f"({rows},)"
        raise InputError(f"{what} has shape {tuple(tensor.shape)}; it must be {needed}, one entry for each batch row")
