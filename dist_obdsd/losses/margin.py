"""The margin loss with distance-weighted sampling.

Legend: b anchors of this rank, B rows of the global batch, C classes, D embedding dimension; d distances;
P draws of an anchor.
"""

import math
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from dist_obdsd.config.base import NonNegative, Positive
from dist_obdsd.losses.base import LearnableLoss, distances, graph_zero
from dist_obdsd.losses.batch_view import BatchView, PartialMean

_GAMMA, _FIRST, _SECOND = (x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class MarginLoss(LearnableLoss):
    """Margin loss with distance-weighted sampling (Wu et al., arXiv 1706.07567).

    >>> ranking = MarginLoss(classes=4)  # its boundaries are parameters
    >>> loss = ranking(embeddings, labels)

    Every pair of an anchor a and a positive p draws one negative n and costs, with Euclidean distances d,

        max(0, alpha + d_ap - beta_a) + max(0, alpha + beta_a - d_an) + nu beta_a

    where beta_a is learned, for the anchor's class or for all. The sum is divided by the number of hinges above 0, as
    the paper's code does. An anchor whose negatives all lie beyond ``nonzero_cutoff`` keeps its positives' cost alone.
    By the ``released`` conventions of OBD-SD's code an anchor draws one positive and one negative at any distance, the
    sum is divided by the number of such triplets with a hinge above 0, and the penalty on beta is not divided; an
    anchor without a positive is its own.
    """

    def __init__(
        self,
        alpha: Positive = 0.2,
        beta: Positive = 1.2,
        per_class: bool = True,
        nu: NonNegative = 0.0,
        cutoff: Positive = 0.5,
        nonzero_cutoff: Positive = 1.4,
        conventions: Literal["correct", "released"] = "correct",
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
            conventions: released: triplets and divisor of OBD-SD's code, without nonzero_cutoff; an unset lr is 0.0005.
        """
        super().__init__()
        self.num_classes = classes if per_class else None
        self.alpha, self.per_class, self.nu, self.released = alpha, per_class, nu, conventions == "released"
        self.cutoff, self.nonzero_cutoff = cutoff, math.inf if self.released else nonzero_cutoff
        self.beta = nn.Parameter(torch.full((classes if per_class else 1,), beta))

    def partial_means(self, view: BatchView) -> dict[str, PartialMean]:
        d_bB = distances(view)
        positive_bB, negative_bB = view.positives_negatives()
        weight_bB, drew_b1 = self.weights(d_bB.detach(), negative_bB, view.E_BD.shape[1])
        uniform_bB = uniforms(view.seed, view.rows, view.B, d_bB.device)
        if self.released:
            positive_bB.diagonal(offset=view.first_row).logical_or_(~positive_bB.any(1))
            near_bP = d_bB.gather(1, draw(uniform_bB[:, :1], positive_bB))
            far_bP, pairs_bP = d_bB.gather(1, draw(uniform_bB[:, 1:2], weight_bB)), drew_b1
        else:
            near_bP, far_bP, pairs_bP = d_bB, d_bB.gather(1, draw(uniform_bB, weight_bB)), positive_bB
        beta = view.shared(self.beta)
        beta_b1 = (beta[view.labels_b] if self.per_class else beta.expand(view.b))[:, None]
        near_bP = functional.relu(self.alpha + near_bP - beta_b1).masked_fill(~pairs_bP, 0)
        far_bP = functional.relu(self.alpha + beta_b1 - far_bP).masked_fill(~(pairs_bP & drew_b1), 0)
        penalty = self.nu * (beta_b1[:, 0] * pairs_bP.sum(1)).sum()
        total = near_bP.sum() + far_bP.sum() + graph_zero(view)
        if not self.released:
            count = (near_bP > 0).sum() + (far_bP > 0).sum()
            return {"ranking": PartialMean(total + penalty, count.to(total.dtype))}
        count = ((near_bP > 0) | (far_bP > 0)).sum().to(total.dtype)
        once = torch.full_like(count, 1 / view.world_size)
        return {"ranking": PartialMean(total, count), "ranking_penalty": PartialMean(penalty, once)}

    @torch.no_grad()
    def weights(self, d_bB: torch.Tensor, negative_bB: torch.Tensor, D: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Weigh an anchor's negatives [b, B], and tell if it has any [b, 1].

        The probability is proportional to 1 / q(max(d, cutoff)), where q is the density of distances between random
        points of the unit sphere (equation 2): ``log q = (D - 2) log d + (D - 3)/2 log(1 - d^2 / 4)``.
        """
        clipped_bB = d_bB.clamp(min=self.cutoff)
        open_bB = (1 - clipped_bB.square() / 4).clamp(min=torch.finfo(d_bB.dtype).tiny)  # d may round to above 2
        log_weight_bB = -(D - 2) * clipped_bB.log() - (D - 3) / 2 * open_bB.log()
        log_weight_bB.masked_fill_(~negative_bB | (d_bB >= self.nonzero_cutoff), -torch.inf)
        top_b1 = log_weight_bB.amax(1, keepdim=True)
        drew_b1 = top_b1 > -torch.inf
        return (log_weight_bB - top_b1.masked_fill(~drew_b1, 0)).exp(), drew_b1


def draw(uniform_bP: torch.Tensor, weight_bB: torch.Tensor) -> torch.Tensor:
    """Draw columns [b, P], where the cumulative weights pass uniform numbers."""
    cumulative_bB = weight_bB.double().cumsum(1)
    at_bP = (uniform_bP * cumulative_bB[:, -1:]).contiguous()
    return torch.searchsorted(cumulative_bB, at_bP, right=True).clamp_(max=weight_bB.shape[1] - 1)


def uniforms(seed: int, rows: slice, B: int, device: torch.device) -> torch.Tensor:
    """Draw rows [b, B] of the batch's [B, B] uniform numbers in [0, 1).

    SplitMix64 (Steele et al., OOPSLA 2014) with the entry's number as its state's: any rank draws its own rows of the
    same matrix, on any device, without the memory for the whole of it.
    """
    numbers_bB = torch.arange(rows.start * B, rows.stop * B, device=device).view(-1, B)
    x_bB = (numbers_bB + 1) * _GAMMA + (seed % 2**63)  # int64 wraps around
    x_bB = (x_bB ^ _shift(x_bB, 30)) * _FIRST
    x_bB = (x_bB ^ _shift(x_bB, 27)) * _SECOND
    return _shift(x_bB ^ _shift(x_bB, 31), 32).double() / 2**32


def _shift(x_bB: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift to the right, filling with zeros where torch would copy the sign."""
    return (x_bB >> bits) & (2 ** (64 - bits) - 1)
