"""The multi-similarity loss with its mining.

Legend: b anchors of this rank, B rows of the global batch; S similarities; _b1 one column of anchors.
"""

from typing import Any

import torch

from dist_obdsd import config
from dist_obdsd.objective.ranking.base import RankingLoss
from dist_obdsd.objective.terms import LEAST_EXPONENT, Term, View


class MultiSimilarity(RankingLoss):
    """Wang et al., CVPR 2019, arXiv 1904.06627, equations 9 to 11.

    Of anchor i, with similarities S, a positive p is kept if ``S_ip < max_n S_in + margin`` and a negative n if
    ``S_in > min_p S_ip - margin``: the pairs whose order is nearly or already wrong. Its loss over the kept ones is

        1/alpha log(1 + sum_p exp(-alpha (S_ip - threshold))) + 1/beta log(1 + sum_n exp(beta (S_in - threshold)))

    An anchor counts if it keeps a positive and a negative; the global loss is the mean over the anchors that count (not
    over the B rows). The anchor itself is left out by its index, so that a duplicate image stays a positive.
    """

    def __init__(self, settings: config.MultiSimilarity) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, view: View) -> dict[str, Term]:
        total, count = _MultiSimilarity.apply(view.S_bB, view.labels_B, view.first_row, self.settings)
        return {"ranking": Term(total, count)}


class _MultiSimilarity(torch.autograd.Function):
    """The loss with its gradient written out, which keeps one [b, B] for the backward.

    Masks are numbers, 0 or 1, and buffers are used again: on a CPU a select or a new [b, B] takes longer than an exp.
    """

    @staticmethod
    def forward(
        ctx: Any, S_bB: torch.Tensor, labels_B: torch.Tensor, first_row: int, settings: config.MultiSimilarity
    ) -> tuple[torch.Tensor, torch.Tensor]:
        alpha, beta, threshold, margin = settings.alpha, settings.beta, settings.threshold, settings.margin
        labels_b1 = labels_B[first_row : first_row + len(S_bB), None]
        same_bB = (labels_b1 == labels_B).to(S_bB.dtype)
        same_b1 = same_bB.sum(1, keepdim=True)
        low, high = S_bB.aminmax()
        beyond = high - low + 1  # moves an entry behind all others

        # The hardest negative, then the hardest positive; of none, something beyond all.
        work_bB = torch.addcmul(S_bB, same_bB, -beyond)
        hardest_negative_b1 = work_bB.amax(1, keepdim=True)
        negative_bB = 1 - same_bB
        same_bB.diagonal(offset=first_row).fill_(0)
        positive_bB = same_bB
        torch.sub(1, positive_bB, out=work_bB)
        hardest_positive_b1 = torch.addcmul(S_bB, work_bB, beyond, out=work_bB).amin(1, keepdim=True)
        # An anchor keeps a positive and a negative if it keeps the hardest ones: one and the same condition.
        limit_b1 = hardest_negative_b1 + margin
        counts_b1 = (hardest_positive_b1 < limit_b1) & (same_b1 > 1) & (same_b1 < S_bB.shape[1])
        count_b1 = counts_b1.to(S_bB.dtype)
        positive_bB.mul_(torch.lt(S_bB, limit_b1, out=work_bB))
        negative_bB.mul_(torch.gt(S_bB, hardest_positive_b1 - margin, out=work_bB))

        # log(1 + sum exp x) = m + log(exp(-m) + sum exp(x - m)) with m the largest of 0 and x: no overflow.
        top_positive_b1 = (alpha * (threshold - hardest_positive_b1)).clamp_(min=0).mul_(count_b1)
        top_negative_b1 = (beta * (hardest_negative_b1 - threshold)).clamp_(min=0).mul_(count_b1)
        above_bB = torch.add(alpha * threshold - top_positive_b1, S_bB, alpha=-alpha, out=work_bB)
        above_bB.clamp_(LEAST_EXPONENT, 0).exp_().mul_(positive_bB)
        below_bB = torch.add(-beta * threshold - top_negative_b1, S_bB, alpha=beta)
        below_bB.clamp_(LEAST_EXPONENT, 0).exp_().mul_(negative_bB)
        above_b1 = above_bB.sum(1, keepdim=True).add_((-top_positive_b1).exp_())
        below_b1 = below_bB.sum(1, keepdim=True).add_((-top_negative_b1).exp_())
        loss_b1 = (top_positive_b1 + above_b1.log()) / alpha + (top_negative_b1 + below_b1.log()) / beta

        ctx.save_for_backward(below_bB.mul_(count_b1 / below_b1).addcmul_(above_bB, count_b1 / above_b1, value=-1))
        count = count_b1.sum()
        ctx.mark_non_differentiable(count)
        # Mining can leave out an entry that is not finite; the zero tells of any.
        return (loss_b1 * count_b1).sum() + beyond * 0, count

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (slope_bB,) = ctx.saved_tensors
        return slope_bB * grads[0], None, None, None
