"""The objective as a single-process script would write it: a Python loop over anchors and a dense inverse.

What the benchmarks compare with; the mathematics is that of ``objective/`` with all rows on one process.
"""

import torch
from torch.nn import functional

from dist_obdsd import config


def multi_similarity(E_BD: torch.Tensor, labels_B: torch.Tensor, settings: config.MultiSimilarity) -> torch.Tensor:
    """The mean over the anchors that keep a positive and a negative."""
    S_BB = E_BD @ E_BD.T
    losses = []
    for i in range(len(labels_B)):
        same_B = labels_B == labels_B[i]
        negatives = S_BB[i][~same_B]
        same_B[i] = False
        positives = S_BB[i][same_B]
        if not len(positives) or not len(negatives):
            continue
        kept_positives = positives[positives < negatives.max() + settings.margin]
        kept_negatives = negatives[negatives > positives.min() - settings.margin]
        if not len(kept_positives) or not len(kept_negatives):
            continue
        above = torch.exp(-settings.alpha * (kept_positives - settings.threshold)).sum()
        below = torch.exp(settings.beta * (kept_negatives - settings.threshold)).sum()
        losses.append(torch.log1p(above) / settings.alpha + torch.log1p(below) / settings.beta)
    return torch.stack(losses).mean() if losses else (E_BD * 0).sum()


@torch.no_grad()
def target(T_BD: torch.Tensor, settings: config.Distillation) -> torch.Tensor:
    """Targets psd and obdsd, all B rows: (1 - omega) (I - omega A)^-1 P."""
    S_BB = T_BD @ T_BD.T
    P_BB = (S_BB / settings.temperature).softmax(1)
    if settings.target == "psd":
        return P_BB
    identity_BB = torch.eye(len(T_BD), dtype=T_BD.dtype, device=T_BD.device)
    A_BB = (S_BB / settings.transition_temperature).masked_fill(identity_BB.bool(), -torch.inf).softmax(1)
    return (1 - settings.omega) * torch.linalg.inv(identity_BB - settings.omega * A_BB) @ P_BB


def objective(
    E_BD: torch.Tensor,
    T_BD: torch.Tensor,
    labels_B: torch.Tensor,
    ranking: config.MultiSimilarity,
    distillation: config.Distillation,
) -> torch.Tensor:
    """Ranking plus weight * temperature^2 * KL."""
    loss = multi_similarity(E_BD, labels_B, ranking)
    if distillation.target == "none":
        return loss
    log_p_BB = functional.log_softmax(E_BD @ E_BD.T / distillation.temperature, dim=1)
    kl = functional.kl_div(log_p_BB, target(T_BD, distillation), reduction="batchmean")
    return loss + distillation.weight * distillation.temperature**2 * kl
