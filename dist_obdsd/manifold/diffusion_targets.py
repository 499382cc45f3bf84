"""Soft targets by diffusion over a batch, as a function."""

import torch

from dist_obdsd.errors import InputError
from dist_obdsd.manifold.diffusion import Diffusion
from dist_obdsd.manifold.targets import target_rows


def diffusion_targets(
    teacher_BD: torch.Tensor,
    rows: slice | None = None,
    *,
    temperature: float = 0.1,
    transition_temperature: float = 0.05,
    omega: float = 0.5,
    symmetric: bool = False,
    neighbours: int | None = None,
    tolerance: float = 1e-4,
) -> torch.Tensor:
    """Compute soft targets by a diffusion over a batch (arXiv 2211.07566, OBDP).

    >>> targets = diffusion_targets(embeddings, omega=0.9)  # [B, B], rows sum to 1

    target = (1 - omega) (I - omega A)^-1 P with S = T T^T, P = softmax(S / temperature) and
    A = softmax(S / transition_temperature) without its diagonal. The symmetric form is
    softmax((1 - omega) (I - omega A)^-1 S / temperature) with A = D^-1/2 max(S, 0) D^-1/2. No inverse is formed; the
    result is accepted by its residual.

    Args:
        teacher_BD: unit rows [B, D] of the whole batch, B at least 2.
        rows: the rows whose targets are wanted; None: all. A rank asks for its own.
        temperature: of the start distribution P.
        transition_temperature: of the random walk A.
        omega: how far the diffusion goes, from 0 to below 1.
        symmetric: take the published form instead of the released one.
        neighbours: let the diffusion run only along edges to the k nearest; None: to all.
        tolerance: largest L1 error of a row.

    Returns:
        [b, B] without gradient, float32, or float64 for float64 rows.

    Raises:
        InputError: shapes or rows do not fit.
        RunError: no solve is accurate enough.
    """
    if rows is not None and rows.step not in (None, 1):
        raise InputError(f"rows is {rows}; give a slice without a step")
    start, stop, _ = (rows or slice(None)).indices(len(teacher_BD))
    diffusion = Diffusion(
        "obdsd_symmetric" if symmetric else "obdsd", temperature, transition_temperature=transition_temperature,
        omega=omega, neighbours=neighbours, tolerance=tolerance,
    )  # fmt: skip
    return target_rows(teacher_BD, slice(start, stop), diffusion).target_bB
