"""The contrastive loss.

Legend: b anchors of this rank, B rows of the global batch.
"""

from torch.nn import functional

from dist_obdsd.config.base import NonNegative, Positive
from dist_obdsd.losses.base import RankingLoss, distances, graph_zero
from dist_obdsd.losses.batch_view import BatchView, PartialMean


class ContrastiveLoss(RankingLoss):
    """Contrastive loss (Hadsell et al., CVPR 2006), with a margin for positives, too.

    >>> loss = ContrastiveLoss(negative_margin=1.0)(embeddings, labels)

    With Euclidean distances d, a positive pair costs ``max(0, d - positive_margin)`` and a negative one
    ``max(0, negative_margin - d)``; these hinges are not squared. The loss is the mean over the positive pairs that
    cost something, plus the mean over the negative ones that do, as in pytorch-metric-learning's ``ContrastiveLoss``.
    """

    def __init__(self, positive_margin: NonNegative = 0.0, negative_margin: Positive = 0.5) -> None:
        """
        Args:
            positive_margin: distance up to which a positive pair costs nothing.
            negative_margin: distance from which a negative pair costs nothing; unit rows are at most 2 apart.
        """
        super().__init__()
        self.positive_margin, self.negative_margin = positive_margin, negative_margin

    def partial_means(self, view: BatchView) -> dict[str, PartialMean]:
        d_bB, zero = distances(view), graph_zero(view)
        positive_bB, negative_bB = view.positives_negatives()
        parts = {
            "ranking_positive": functional.relu(d_bB - self.positive_margin).masked_fill(~positive_bB, 0),
            "ranking_negative": functional.relu(self.negative_margin - d_bB).masked_fill(~negative_bB, 0),
        }
        return {
            name: PartialMean(cost_bB.sum() + zero, (cost_bB > 0).sum().to(zero)) for name, cost_bB in parts.items()
        }
