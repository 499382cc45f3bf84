"""Distillation: the student's similarities follow the target's, and figures that say what the target is like.

Legend: b rows of this rank, B rows of the global batch, D embedding dimension.
"""

import math

import torch
from torch.nn import functional

from dist_obdsd.errors import InputError
from dist_obdsd.objective.terms import Term, similarity

NORMALISED = 1e-4
"""How far a target row's sum may be from 1."""


def kl_term(E_bD: torch.Tensor, E_BD: torch.Tensor, target_bB: torch.Tensor, temperature: float) -> Term:
    """KL(target || softmax(E E^T / temperature)), summed over this rank's rows (arXiv 2211.07566).

        KL_i = sum_j target_ij (log target_ij - log p_ij),   p_i = softmax_j(E_i . E_j / temperature)

    The student's softmax always runs over all B columns, its own included, also where the target's own entry is masked.

    Args:
        E_bD: unit rows of this rank.
        E_BD: unit rows of all ranks, with gradient.
        target_bB: rows that sum to 1, without gradient; an entry of 0 contributes 0.

    Returns:
        Sum over this rank's rows, and b.

    Raises:
        InputError: if the target has another shape.
    """
    b, B = E_bD.shape[0], E_BD.shape[0]
    if target_bB.shape != (b, B):
        raise InputError(f"the target has shape {tuple(target_bB.shape)}; it must be {(b, B)}, own rows by batch")
    log_p_bB = functional.log_softmax(similarity(E_bD, E_BD) / temperature, dim=1)
    total = functional.kl_div(log_p_bB, target_bB.detach().to(log_p_bB.dtype), reduction="sum")
    return Term(total, log_p_bB.new_full((), b))


@torch.no_grad()
def target_statistics(target_bB: torch.Tensor, first_row: int) -> dict[str, Term]:
    """What a target is like, for the log, as means over the rows.

    Returns:
        ``target_entropy`` in nats, at most log B; ``target_kl_to_uniform`` = sum_j target_ij log(B target_ij), near 0
        when there is nothing to distil; ``target_self_mass`` = target_ii, near 1 when a row is all about itself;
        ``target_defects``, the share of rows that are no distribution: a negative entry or a sum that is off by more
        than 1e-4.
    """
    b, B = target_bB.shape
    count = target_bB.new_full((), b)
    entropy = torch.special.entr(target_bB).sum()
    sum_b = target_bB.sum(1)
    # Put this way round NaN is a defect, too.
    defects_b = ~((sum_b - 1).abs() <= NORMALISED) | ~(target_bB.amin(1) >= 0)
    return {
        "target_entropy": Term(entropy, count),
        "target_kl_to_uniform": Term(math.log(B) * sum_b.sum() - entropy, count),
        "target_self_mass": Term(target_bB.diagonal(offset=first_row).sum(), count),
        "target_defects": Term(defects_b.sum().to(count.dtype), count),
    }
