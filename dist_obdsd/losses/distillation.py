"""Distillation: the student's similarities follow the target.

Legend: b rows of this rank, B rows of the batch.
"""

import math
from typing import Any

import torch

from dist_obdsd.errors import InputError
from dist_obdsd.losses.batch_view import PartialMean
from dist_obdsd.manifold.similarity import LOG2_E

NORMALISED = 1e-4
"""Largest distance of a target row's sum from 1."""


def distil(S_bB: torch.Tensor, target_bB: torch.Tensor, temperature: float, first_row: int) -> dict[str, PartialMean]:
    """Compute KL(target || softmax(S / temperature)) of own rows, and its figures.

        KL_i = sum_j target_ij (log target_ij - log p_ij),   p_i = softmax_j(S_ij / temperature), own column included

    Args:
        S_bB: the student's similarities of own rows to the batch, with gradient.
        target_bB: rows that sum to 1, without gradient; an entry of 0 contributes 0.
        first_row: where the own rows begin in the batch.

    Returns:
        Sums over this rank's rows, and b: ``distillation``, the divergence; then, for the log, ``target_entropy`` in
        nats, at most log B; ``target_kl_to_uniform`` = sum_j target_ij log(B target_ij), near 0 when there is nothing
        to distil; ``target_self_mass`` = target_ii, near 1 when a row is all about itself; ``target_defects``, the
        share of rows that are no distribution: a negative entry or a sum that is off by more than 1e-4.

    Raises:
        InputError: if the target has another shape.
    """
    b, B = S_bB.shape
    if target_bB.shape != (b, B):
        raise InputError(f"the target has shape {tuple(target_bB.shape)}; it must be {(b, B)}, own rows by batch")
    with torch.no_grad():
        target_bB = target_bB.to(S_bB.dtype)
        sum_b = target_bB.sum(1)
        # A third of what xlogy takes; 0 log 0 is 0 here, too.
        t_log_t_bB = target_bB.clamp_min(torch.finfo(S_bB.dtype).tiny).log_().mul_(target_bB)
        negentropy, mass = t_log_t_bB.sum(), sum_b.sum()
        # Put this way round NaN is a defect, too.
        sound_b = ((sum_b - 1).abs_() <= NORMALISED) & (target_bB.amin(1) >= 0)
        count = sum_b.new_full((), b)
    return {
        "distillation": PartialMean(_Divergence.apply(S_bB, target_bB, t_log_t_bB, sum_b, temperature), count),
        "target_entropy": PartialMean(-negentropy, count),
        "target_kl_to_uniform": PartialMean(torch.add(negentropy, mass, alpha=math.log(B)), count),
        "target_self_mass": PartialMean(target_bB.diagonal(offset=first_row).sum(), count),
        "target_defects": PartialMean(count - sound_b.sum(), count),
    }


class _Divergence(torch.autograd.Function):
    """KL with gradient dKL_i / dS_ij = (p_ij sum_k target_ik - target_ij) / t."""

    @staticmethod
    def forward(
        ctx: Any, S_bB: torch.Tensor, target_bB: torch.Tensor, t_log_t_bB: torch.Tensor, sum_b: torch.Tensor,
        temperature: float,
    ) -> torch.Tensor:  # fmt: skip
        log_p_bB = (S_bB if temperature == 1 else S_bB / temperature).log_softmax(1)
        total = t_log_t_bB.addcmul_(target_bB, log_p_bB, value=-1).sum()
        p_bB = log_p_bB.mul_(LOG2_E).exp2_()
        ctx.save_for_backward(p_bB.mul_(sum_b[:, None] / temperature).sub_(target_bB, alpha=1 / temperature))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (slope_bB,) = ctx.saved_tensors
        return slope_bB * grads[0], None, None, None, None
