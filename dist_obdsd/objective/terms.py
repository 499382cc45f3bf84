"""What every part of the objective shares: the share of a mean that one rank holds, and similarities.

Legend: b rows of this rank, B rows of the global batch, D embedding dimension.
"""

from dataclasses import dataclass

import torch

from dist_obdsd.errors import InputError


@dataclass(frozen=True)
class Term:
    """This rank's share of a mean over the global batch. The mean is (sum over the ranks) / (count over the ranks)."""

    sum: torch.Tensor
    """Scalar."""
    count: torch.Tensor
    """Scalar of the same dtype and device, without gradient."""


def similarity(X_bD: torch.Tensor, Y_BD: torch.Tensor) -> torch.Tensor:
    """Inner products [b, B], cosines for unit rows, in float32 or, if a factor is float64, in float64.

    Autocast is off inside, and half precision is widened first: at temperature 0.005 the rounding of a bfloat16 product
    would move a logit by up to 0.8.
    """
    with torch.autocast(X_bD.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(X_bD.dtype, Y_BD.dtype), torch.float32)
        return X_bD.to(dtype) @ Y_BD.to(dtype).T


def check_rows(what: str, tensor: torch.Tensor, rows: int, dims: int) -> None:
    """Check a tensor's number of rows and of dimensions, which are known without waiting for a GPU.

    Raises:
        InputError: naming the shape found and the one needed.
    """
    if tensor.dim() != dims or tensor.shape[0] != rows:
        needed = f"({rows}, D)" if dims == 2 else f"({rows},)"
        raise InputError(f"{what} has shape {tuple(tensor.shape)}; it must be {needed}, one entry for each batch row")
