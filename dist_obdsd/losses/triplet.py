"""The triplet loss over semi-hard negatives.

Legend: b anchors of this rank, B rows of the global batch, N = B + 1.
"""

import torch
from torch.nn import functional

from dist_obdsd.config.base import Positive
from dist_obdsd.losses.base import RankingLoss, graph_zero, squared_distances
from dist_obdsd.losses.batch_view import BatchView, PartialMean


class TripletLoss(RankingLoss):
    """Triplet loss of FaceNet (Schroff et al., CVPR 2015, arXiv 1503.03832).

    >>> loss = TripletLoss(margin=0.2)(embeddings, labels)

    The paper's equations 2 and 4 use squared distances d. For every pair of an anchor a and a positive p, all semi-hard
    negatives n count, those with ``d_ap < d_an < d_ap + margin``. The loss is the mean of ``d_ap - d_an + margin`` over
    all these triplets. (The paper samples from them.)
    """

    def __init__(self, margin: Positive = 0.2) -> None:
        """
        Args:
            margin: how much farther than the positive the negative should be.
        """
        super().__init__()
        self.margin = margin

    def partial_means(self, view: BatchView) -> dict[str, PartialMean]:
        d_bB = squared_distances(view)
        weights_bB, count = self._weights(d_bB.detach(), *view.positives_negatives())
        return {"ranking": PartialMean((weights_bB * d_bB).sum() + self.margin * count + graph_zero(view), count)}

    @torch.no_grad()
    def _weights(
        self, d_bB: torch.Tensor, positive_bB: torch.Tensor, negative_bB: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Count each pair's triplets [b, B], negatives with a minus, and all triplets.

        The sum over the triplets is linear in d, so it needs no triplet, only these numbers, and those come from one
        sort: B log B per anchor instead of B^2.
        """
        d_bB, order_bB = d_bB.sort(1)
        positive_bB, negative_bB = positive_bB.gather(1, order_bB), negative_bB.gather(1, order_bB)
        positives_bN, negatives_bN = (functional.pad(x_bB.cumsum(1), (1, 0)) for x_bB in (positive_bB, negative_bB))
        far_bB = d_bB + self.margin

        def among(counted_bN: torch.Tensor, in_bB: torch.Tensor, limit_bB: torch.Tensor, equal: bool) -> torch.Tensor:
            """Count those of one kind below each limit, or below and at it."""
            return counted_bN.gather(1, torch.searchsorted(in_bB, limit_bB, right=equal))

        # Of a positive: the negatives with d_ap < d_an < d_ap + margin.
        as_positive_bB = among(negatives_bN, d_bB, far_bB, False) - among(negatives_bN, d_bB, d_bB, True)
        # Of a negative: the same two comparisons, with the same rounding, from the other side.
        as_negative_bB = among(positives_bN, d_bB, d_bB, False) - among(positives_bN, far_bB, d_bB, True)
        as_positive_bB.masked_fill_(~positive_bB, 0)
        as_negative_bB.masked_fill_(~negative_bB, 0)
        weights_bB = torch.empty_like(order_bB).scatter_(1, order_bB, as_positive_bB - as_negative_bB)
        return weights_bB.to(d_bB.dtype), as_positive_bB.sum().to(d_bB.dtype)
