"""The proxy anchor loss.

Legend: B rows of the global batch, C classes, c of them this rank's share, D embedding dimension.
"""

import torch
from torch import nn
from torch.nn import functional

from dist_obdsd.config.base import NonNegative, Positive
from dist_obdsd.errors import InputError
from dist_obdsd.losses.base import LearnableLoss, graph_zero
from dist_obdsd.losses.batch_view import BatchView, PartialMean
from dist_obdsd.manifold.similarity import similarity


class ProxyAnchorLoss(LearnableLoss):
    """Proxy anchor loss (Kim et al., CVPR 2020, arXiv 2003.13911, equation 4).

    >>> ranking = ProxyAnchorLoss(classes=4, embedding_dim=16)  # its proxies are parameters
    >>> loss = ranking(embeddings, labels)

    One learned proxy p per class, with cosines s(x, p):

        mean over proxies with a row of their class in the batch of log(1 + sum_x exp(-alpha (s(x, p) - delta))), x in
        the proxy's class, plus the mean over all C proxies of log(1 + sum_x exp(alpha (s(x, p) + delta))), x in others

    The anchors are the proxies, so each rank takes a share of them against all rows of the batch.
    """

    def __init__(self, alpha: Positive = 32.0, delta: NonNegative = 0.1, *, classes: int, embedding_dim: int) -> None:
        """
        Args:
            alpha: scale of the similarities.
            delta: the margin.
        """
        super().__init__()
        self.num_classes = classes
        self.alpha, self.delta = alpha, delta
        self.proxies = nn.Parameter(torch.empty(classes, embedding_dim))
        nn.init.kaiming_normal_(self.proxies, mode="fan_out")  # as the authors' code does

    def partial_means(self, view: BatchView) -> dict[str, PartialMean]:
        C, D = self.proxies.shape
        if view.E_BD.shape[1] != D:
            raise InputError(f"embeddings have {view.E_BD.shape[1]} dimensions but the proxies {D}; make them equal")
        zero, rank, W = graph_zero(view), view.first_row // view.b, view.world_size
        share = slice(rank * C // W, (rank + 1) * C // W)
        proxies_cD = functional.normalize(view.shared(self.proxies)[share], dim=1)
        S_cB = similarity(proxies_cD, view.E_BD)
        own_cB = torch.arange(share.start, share.stop, device=S_cB.device)[:, None] == view.labels_B
        positive_c = _log1p_sum_exp(-self.alpha * (S_cB - self.delta), own_cB)
        negative_c = _log1p_sum_exp(self.alpha * (S_cB + self.delta), ~own_cB)
        count = own_cB.any(1).sum().to(positive_c.dtype)
        return {
            "ranking_positive": PartialMean(positive_c.sum() + zero, count),
            "ranking_negative": PartialMean(negative_c.sum() + zero, torch.full_like(count, share.stop - share.start)),
        }


def _log1p_sum_exp(x_cB: torch.Tensor, keep_cB: torch.Tensor) -> torch.Tensor:
    """Compute log(1 + sum of exp(x) over kept entries) [c]; the 1 is a column exp(0)."""
    return functional.pad(x_cB.masked_fill(~keep_cB, -torch.inf), (1, 0)).logsumexp(1)
