"""The multi-similarity loss with its mining.

Legend: b anchors of this rank, B rows of the global batch; S similarities; _b1 one column of anchors.
"""

from typing import Any

import torch
from torch.nn import functional

from dist_obdsd.config.base import NonNegative, Positive
from dist_obdsd.losses.base import RankingLoss
from dist_obdsd.losses.batch_view import BatchView, PartialMean
from dist_obdsd.manifold.similarity import LEAST_EXPONENT, LOG2_E


class MultiSimilarityLoss(RankingLoss):
    """Multi-similarity loss with its mining (Wang et al., arXiv 1904.06627).

    >>> loss = MultiSimilarityLoss()(embeddings, labels)

    The paper's equations 9 to 11: anchor i with similarities S keeps a positive p if ``S_ip < max_n S_in + margin`` and
    a negative n if ``S_in > min_p S_ip - margin``. The anchor's loss over them is

        1/alpha log(1 + sum_p exp(-alpha (S_ip - threshold))) + 1/beta log(1 + sum_n exp(beta (S_in - threshold)))

    An anchor counts if it keeps a positive and a negative; the global loss is the mean over the anchors that count.
    """

    def __init__(
        self, alpha: Positive = 2.0, beta: Positive = 40.0, threshold: float = 0.5, margin: NonNegative = 0.1
    ) -> None:
        """
        Args:
            alpha: weight of positives below the threshold.
            beta: weight of negatives above the threshold.
            threshold: the similarity lambda that positives should exceed and negatives stay below.
            margin: the mining margin epsilon.
        """
        super().__init__()
        self.alpha, self.beta, self.threshold, self.margin = alpha, beta, threshold, margin

    def partial_means(self, view: BatchView) -> dict[str, PartialMean]:
        total, count = _MultiSimilarity.apply(view.S_bB, view.labels_B, view.first_row, self)
        return {"ranking": PartialMean(total, count)}


class _MultiSimilarity(torch.autograd.Function):
    """The loss with its gradient written out, which keeps one [b, B] for the backward.

    On a CPU a select takes longer than an exp: masks are numbers, 0 or 1, and what a mask leaves out of a maximum is
    moved far away.
    """

    @staticmethod
    def forward(
        ctx: Any, S_bB: torch.Tensor, labels_B: torch.Tensor, first_row: int, loss: MultiSimilarityLoss
    ) -> tuple[torch.Tensor, torch.Tensor]:
        alpha, beta, threshold, margin = loss.alpha, loss.beta, loss.threshold, loss.margin
        labels_B = labels_B.to(S_bB.dtype)  # exact below 2^24; numbers of one type compare in a quarter of the time
        labels_b1 = labels_B[first_row : first_row + len(S_bB), None]
        far = torch.finfo(S_bB.dtype).max ** 0.5  # a similarity is nothing beside it

        negatives_bB = torch.eq(labels_b1, labels_B, out=torch.empty_like(S_bB))
        negatives_bB = torch.add(S_bB, negatives_bB, alpha=-far, out=negatives_bB)
        hardest_negative_b1 = negatives_bB.amax(1, keepdim=True)
        positives_bB = torch.ne(labels_b1, labels_B, out=torch.empty_like(S_bB))
        positives_bB.diagonal(offset=first_row).fill_(1)
        positives_bB = torch.add(S_bB, positives_bB, alpha=far, out=positives_bB)
        hardest_positive_b1 = positives_bB.amin(1, keepdim=True)
        # An anchor keeps a positive and a negative if it keeps the hardest ones: one and the same condition.
        limit_b1 = hardest_negative_b1 + margin
        count_b1 = torch.lt(hardest_positive_b1, limit_b1).to(S_bB.dtype)

        kept_bB = torch.lt(positives_bB, limit_b1, out=torch.empty_like(S_bB))
        above_b1, slope_b1, above_bB = _soft(positives_bB, kept_bB, hardest_positive_b1, threshold, -alpha)
        kept_bB = torch.gt(negatives_bB, hardest_positive_b1 - margin, out=kept_bB)
        below_b1, rise_b1, below_bB = _soft(negatives_bB, kept_bB, hardest_negative_b1, threshold, beta)

        below_bB.mul_(rise_b1.mul_(count_b1))
        ctx.save_for_backward(below_bB.addcmul_(above_bB, slope_b1.mul_(count_b1), value=-1))
        count = count_b1.sum()
        ctx.mark_non_differentiable(count)
        # An entry that is not finite is one of its row's hardest, whatever its label, and makes this NaN.
        return above_b1.add_(below_b1, alpha=alpha / beta).mul_(count_b1).sum().div_(alpha), count

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (slope_bB,) = ctx.saved_tensors
        return slope_bB * grads[0], None, None, None


def _soft(
    S_bB: torch.Tensor, kept_bB: torch.Tensor, hardest_b1: torch.Tensor, threshold: float, k: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute log(1 + sum exp(k (S - threshold))) [b, 1] over kept entries.

    Overwrites S. Also returns two factors, [b, 1] and [b, B], whose product, times k, is its slope.
    """
    exponents_bB = torch.add(hardest_b1 * (-k * LOG2_E), S_bB, alpha=k * LOG2_E, out=S_bB)
    above_bB = exponents_bB.clamp_min_(LEAST_EXPONENT).exp2_().mul_(kept_bB)
    sum_b1 = above_bB.sum(1, keepdim=True).clamp_min_(0.5)  # at least 1 where anything is kept
    mean_b1 = (hardest_b1 - threshold).mul_(k).add_(sum_b1.log())
    # Beyond 80 the 1 is nothing, in float64, too.
    return functional.softplus(mean_b1, 1, 80), mean_b1.sigmoid_().div_(sum_b1), above_bB
