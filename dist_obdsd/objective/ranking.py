"""Ranking losses: this rank's anchors against the whole batch.

Legend: b anchors of this rank, B rows of the global batch, D embedding dimension.
"""

import torch
from torch.nn import functional

from dist_obdsd.errors import InputError
from dist_obdsd.objective.terms import Term, check_rows, similarity


def multi_similarity(
    E_bD: torch.Tensor,
    E_BD: torch.Tensor,
    labels_b: torch.Tensor,
    labels_B: torch.Tensor,
    first_row: int,
    *,
    alpha: float,
    beta: float,
    threshold: float,
    margin: float,
) -> Term:
    """The multi-similarity loss with its mining (Wang et al., CVPR 2019, arXiv 1904.06627, equations 9 to 11).

    Of anchor i, with similarities S, a positive p is kept if ``S_ip < max_n S_in + margin`` and a negative n if
    ``S_in > min_p S_ip - margin``: the pairs whose order is nearly or already wrong. Its loss over the kept ones is

        1/alpha log(1 + sum_p exp(-alpha (S_ip - threshold))) + 1/beta log(1 + sum_n exp(beta (S_in - threshold)))

    An anchor counts if it keeps a positive and a negative; the global loss is the mean over the anchors that count (not
    over the B rows). The anchor itself is left out by its index, so that a duplicate image stays a positive.

    Args:
        E_bD: unit rows of this rank.
        E_BD: unit rows of all ranks, with gradient.
        labels_b, labels_B: integer class of each row.
        first_row: where this rank's rows begin in the batch.

    Returns:
        Sum over this rank's counting anchors and their number. Without any, a 0 that is still part of the graph: its
        gradient is 0 everywhere. NaN embeddings give a NaN sum.

    Raises:
        InputError: if shapes do not fit.
    """
    b, B = E_bD.shape[0], E_BD.shape[0]
    if not 0 <= first_row <= B - b:
        raise InputError(f"first_row is {first_row} with {b} of {B} rows; it must be within 0 and {B - b}")
    check_rows("labels_b", labels_b, b, 1)
    check_rows("labels_B", labels_B, B, 1)
    S_bB = similarity(E_bD, E_BD)
    same_bB = labels_b[:, None] == labels_B
    self_bB = torch.arange(first_row, first_row + b, device=S_bB.device)[:, None] == torch.arange(B, device=S_bB.device)
    positive_bB, negative_bB = same_bB & ~self_bB, ~same_bB

    mined_bB = S_bB.detach()
    hardest_positive_b1 = mined_bB.masked_fill(~positive_bB, torch.inf).amin(1, keepdim=True)
    hardest_negative_b1 = mined_bB.masked_fill(~negative_bB, -torch.inf).amax(1, keepdim=True)
    # Comparisons with NaN are false; put this way round they keep a NaN, which then reaches the loss and is noticed.
    positive_bB = positive_bB & ~(mined_bB >= hardest_negative_b1 + margin)
    negative_bB = negative_bB & ~(mined_bB <= hardest_positive_b1 - margin)
    counts_b = positive_bB.any(1) & negative_bB.any(1)

    loss_b = (
        _log1p_sum_exp(-alpha * (S_bB - threshold), positive_bB) / alpha
        + _log1p_sum_exp(beta * (S_bB - threshold), negative_bB) / beta
    )
    return Term(torch.where(counts_b | loss_b.isnan(), loss_b, 0.0).sum(), counts_b.sum().to(S_bB.dtype))


def _log1p_sum_exp(x_bB: torch.Tensor, keep_bB: torch.Tensor) -> torch.Tensor:
    """log(1 + sum of exp(x) over the kept entries) per row [b], without overflow.

    The 1 is one more column, exp(0); with it no row is all -inf, whose gradient would be NaN.
    """
    return functional.pad(x_bB.masked_fill(~keep_bB, -torch.inf), (1, 0)).logsumexp(1)
