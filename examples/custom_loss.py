"""A ranking loss of your own, exact across ranks, in a loop or in a run without a fork of this project:

PYTHONPATH=examples dist-obdsd train configs/glyphs_tiny.yaml ranking.name=custom_loss:SupConLoss
"""

import torch

from dist_obdsd import RankingLoss
from dist_obdsd.losses.base import graph_zero
from dist_obdsd.losses.batch_view import BatchView, PartialMean


class SupConLoss(RankingLoss):
    """Supervised contrastive loss (Khosla et al., NeurIPS 2020, arXiv 2004.11362, equation 2).

    For anchor i with positives P(i): -1/|P(i)| sum_p log( exp(S_ip / t) / sum_{a != i} exp(S_ia / t) ); the loss is the
    mean over the anchors that have a positive.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = temperature

    def partial_means(self, view: BatchView) -> dict[str, PartialMean]:
        """Own rows against all rows of the batch: a sum and a count, which are added up over the ranks."""
        positive_bB, _ = view.positives_negatives()
        logits_bB = view.S_bB / self.temperature
        itself_bB = torch.zeros_like(positive_bB)
        itself_bB.diagonal(offset=view.first_row).fill_(True)
        log_p_bB = logits_bB - logits_bB.masked_fill(itself_bB, -torch.inf).logsumexp(1, keepdim=True)
        count_b = positive_bB.sum(1)
        loss_b = -log_p_bB.masked_fill(~positive_bB, 0).sum(1) / count_b.clamp(min=1)
        return {"ranking": PartialMean(loss_b.sum() + graph_zero(view), (count_b > 0).sum().to(loss_b))}


class MeanDistance(torch.nn.Module):
    """Or any module of a whole batch, which every rank then computes on all rows: simpler, and exact, too."""

    def forward(self, embeddings_BD: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
        same_BB = labels_B[:, None] == labels_B
        return (embeddings_BD @ embeddings_BD.T).where(~same_BB, 0).mean()
