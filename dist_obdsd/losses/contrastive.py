"""The contrastive loss.

Legend: b anchors of this rank, B rows of the global batch.
"""

from torch.nn import functional

from dist_obdsd.config import ContrastiveConfig
from dist_obdsd.losses.base import RankingLoss, distances, graph_zero
from dist_obdsd.losses.batch_view import BatchView, PartialMean


class Contrastive(RankingLoss):
    """Hadsell et al., CVPR 2006, with hinges that are not squared and a margin for positives, too.

    With Euclidean distances d, a positive pair costs ``max(0, d - positive_margin)`` and a negative one
    ``max(0, negative_margin - d)``. The loss is the mean over the positive pairs that cost something plus the mean over
    the negative ones that do, as pytorch-metric-learning's ``ContrastiveLoss`` takes them: easy pairs do not dilute it.
    """

    def __init__(self, config: ContrastiveConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, view: BatchView) -> dict[str, PartialMean]:
        d_bB, zero = distances(view), graph_zero(view)
        positive_bB, negative_bB = view.positives_negatives()
        parts = {
            "ranking_positive": functional.relu(d_bB - self.config.positive_margin).masked_fill(~positive_bB, 0),
            "ranking_negative": functional.relu(self.config.negative_margin - d_bB).masked_fill(~negative_bB, 0),
        }
        return {
            name: PartialMean(cost_bB.sum() + zero, (cost_bB > 0).sum().to(zero)) for name, cost_bB in parts.items()
        }
