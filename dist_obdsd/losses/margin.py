"""The margin loss with distance-weighted sampling.

Legend: b anchors of this rank, B rows of the global batch, C classes, D embedding dimension; d distances.
"""

import torch
from torch import nn
from torch.nn import functional

from dist_obdsd.config.base import NonNegative, Positive
from dist_obdsd.losses.base import LearnableLoss, distances, graph_zero
from dist_obdsd.losses.batch_view import BatchView, PartialMean
from dist_obdsd.losses.counter_rng import uniforms


class MarginLoss(LearnableLoss):
    """Margin loss with distance-weighted sampling (Wu et al., ICCV 2017, arXiv 1706.07567).

    Every pair of an anchor a and a positive p draws one negative n and costs, with Euclidean distances d,

        max(0, alpha + d_ap - beta_a) + max(0, alpha + beta_a - d_an) + nu beta_a

    where beta_a is learned, for the anchor's class or for all. The sum is divided by the number of hinges above 0, as
    the authors' code does. An anchor whose negatives all lie beyond ``nonzero_cutoff`` draws none: it keeps its
    positives' cost alone.
    """

    def __init__(
        self,
        alpha: Positive = 0.2,
        beta: Positive = 1.2,
        per_class: bool = True,
        nu: NonNegative = 0.0,
        cutoff: Positive = 0.5,
        nonzero_cutoff: Positive = 1.4,
        *,
        classes: int,
    ) -> None:
        """
        Args:
            alpha: half width of the band around the boundary beta.
            beta: the boundary's initial distance; it is learned.
            per_class: one boundary per class instead of one for all.
            nu: weight of the penalty on beta.
            cutoff: distance below which a negative is drawn as if it were this far away.
            nonzero_cutoff: distance above which a negative is never drawn.
        """
        super().__init__()
        self.num_classes = classes if per_class else None
        self.alpha, self.per_class, self.nu = alpha, per_class, nu
        self.cutoff, self.nonzero_cutoff = cutoff, nonzero_cutoff
        self.beta = nn.Parameter(torch.full((classes if per_class else 1,), beta))

    def partial_means(self, view: BatchView) -> dict[str, PartialMean]:
        alpha, nu = self.alpha, self.nu
        d_bB = distances(view)
        positive_bB, negative_bB = view.positives_negatives()
        drawn_bB, drew_b = self.draw(d_bB.detach(), negative_bB, view)
        beta = view.shared(self.beta)
        beta_b1 = (beta[view.labels_b] if self.per_class else beta.expand(view.b))[:, None]
        near_bB = functional.relu(alpha + d_bB - beta_b1).masked_fill(~positive_bB, 0)
        far_bB = functional.relu(alpha + beta_b1 - d_bB.gather(1, drawn_bB))
        far_bB = far_bB.masked_fill(~(positive_bB & drew_b[:, None]), 0)
        penalty = nu * (beta_b1[:, 0] * positive_bB.sum(1)).sum()
        count = (near_bB > 0).sum() + (far_bB > 0).sum()
        total = near_bB.sum() + far_bB.sum() + penalty + graph_zero(view)
        return {"ranking": PartialMean(total, count.to(total.dtype))}

    @torch.no_grad()
    def draw(self, d_bB: torch.Tensor, negative_bB: torch.Tensor, view: BatchView) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw a negative's row for each of the anchor's columns [b, B], and tell whether it has any [b].

        The probability is proportional to 1 / q(max(d, cutoff)), where q is the density of distances between random
        points of the unit sphere (equation 2): ``log q = (D - 2) log d + (D - 3)/2 log(1 - d^2 / 4)``. Close negatives
        would be drawn with gradients of high variance, hence the cutoff; those from ``nonzero_cutoff`` on are left out.
        """
        D = view.E_BD.shape[1]
        clipped_bB = d_bB.clamp(min=self.cutoff)
        open_bB = (1 - clipped_bB.square() / 4).clamp(min=torch.finfo(d_bB.dtype).tiny)  # d may round to above 2
        log_weight_bB = -(D - 2) * clipped_bB.log() - (D - 3) / 2 * open_bB.log()
        log_weight_bB.masked_fill_(~negative_bB | (d_bB >= self.nonzero_cutoff), -torch.inf)
        top_b1 = log_weight_bB.amax(1, keepdim=True)
        drew_b = top_b1[:, 0] > -torch.inf
        weight_bB = (log_weight_bB - top_b1.masked_fill(~drew_b[:, None], 0)).exp()
        # The inverse of the cumulative weights, at uniform numbers; a weight of 0 has no width and is not hit.
        cumulative_bB = weight_bB.double().cumsum(1)
        at_bB = uniforms(view.seed, view.rows, view.B, d_bB.device) * cumulative_bB[:, -1:]
        return torch.searchsorted(cumulative_bB, at_bB, right=True).clamp_(max=view.B - 1), drew_b
