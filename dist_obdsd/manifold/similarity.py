"""Similarities of rows in full precision.

Legend: b rows of this rank, B rows of the global batch, D embedding dimension.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

LOG2_E = math.log2(math.e)
"""e^x is 2^(x LOG2_E), and torch's exp2 takes a third of the time of its exp on a CPU."""
LEAST_EXPONENT = -115.0
"""Least exponent of 2: 2e-35 changes no sum, and smaller numbers make a CPU slow."""


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Open a context without autocast, where there is any: torch's own is slow."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def similarity(X_bD: torch.Tensor, Y_BD: torch.Tensor) -> torch.Tensor:
    """Compute inner products [b, B] in float32, or float64 if a factor is.

    Autocast is off inside, and half precision is widened first: at temperature 0.005 the rounding of a bfloat16 product
    would move a logit by up to 0.8.
    """
    with without_autocast(X_bD.device):
        dtype = torch.promote_types(torch.promote_types(X_bD.dtype, Y_BD.dtype), torch.float32)
        if X_bD is Y_BD and X_bD.requires_grad:
            return _Gram.apply(X_bD.to(dtype))
        return X_bD.to(dtype) @ Y_BD.to(dtype).T


class _Gram(torch.autograd.Function):
    """Compute X X^T, whose gradient (G + G^T) X takes one product in place of two."""

    @staticmethod
    def forward(ctx: Any, X_BD: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(X_BD)
        return X_BD @ X_BD.T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (X_BD,) = ctx.saved_tensors
        with without_autocast(X_BD.device):
            return (grads[0] + grads[0].T) @ X_BD
