"""The objective as a single-process script would write it: a Python loop over anchors and a dense inverse.

What the benchmarks compare with; the mathematics is that of ``objective/`` with all rows on one process.
"""

import torch
from torch.nn import functional

from dist_obdsd.config.sections import DistillationConfig
from dist_obdsd.losses.multi_similarity import MultiSimilarityLoss
from dist_obdsd.manifold.diffusion import Diffusion


def multi_similarity(E_BD: torch.Tensor, labels_B: torch.Tensor, config: MultiSimilarityLoss) -> torch.Tensor:
    """The mean over the anchors that keep a positive and a negative."""
    S_BB = E_BD @ E_BD.T
    losses = []
    for i in range(len(labels_B)):
        positive_B = labels_B == labels_B[i]
        positive_B[i] = False
        negative_B = labels_B != labels_B[i]
        if not positive_B.any() or not negative_B.any():
            continue
        positives, negatives = S_BB[i][positive_B], S_BB[i][negative_B]
        keep_positive = positives - config.margin < negatives.max()
        keep_negative = negatives + config.margin > positives.min()
        if not keep_positive.any() or not keep_negative.any():
            continue
        positives, negatives = positives[keep_positive], negatives[keep_negative]
        above = torch.sum(torch.exp(-config.alpha * (positives - config.threshold)))
        below = torch.sum(torch.exp(config.beta * (negatives - config.threshold)))
        losses.append(torch.log(1 + above) / config.alpha + torch.log(1 + below) / config.beta)
    return torch.stack(losses).mean() if losses else (E_BD * 0).sum()


@torch.no_grad()
def target(T_BD: torch.Tensor, config: DistillationConfig | Diffusion) -> torch.Tensor:
    """Targets psd and obdsd, all B rows: (1 - omega) (I - omega A)^-1 P."""
    S_BB = T_BD @ T_BD.T
    P_BB = (S_BB / config.temperature).softmax(1)
    if config.target == "psd":
        return P_BB
    identity_BB = torch.eye(len(T_BD), dtype=T_BD.dtype, device=T_BD.device)
    A_BB = (S_BB / config.transition_temperature).masked_fill(identity_BB.bool(), -torch.inf).softmax(1)
    return (1 - config.omega) * torch.linalg.inv(identity_BB - config.omega * A_BB) @ P_BB


def objective(
    E_BD: torch.Tensor,
    T_BD: torch.Tensor,
    labels_B: torch.Tensor,
    ranking: MultiSimilarityLoss,
    distillation: DistillationConfig,
) -> torch.Tensor:
    """Ranking plus weight * temperature^2 * KL."""
    loss = multi_similarity(E_BD, labels_B, ranking)
    if distillation.target == "none":
        return loss
    log_p_BB = functional.log_softmax(E_BD @ E_BD.T / distillation.temperature, dim=1)
    kl = functional.kl_div(log_p_BB, target(T_BD, distillation), reduction="batchmean")
    return loss + distillation.weight * distillation.temperature**2 * kl
