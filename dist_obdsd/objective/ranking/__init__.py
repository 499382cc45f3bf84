"""The ranking losses: how a batch's embeddings should lie with respect to its labels."""

import torch

from dist_obdsd import config
from dist_obdsd.objective.ranking.base import RankingLoss
from dist_obdsd.objective.ranking.contrastive import Contrastive
from dist_obdsd.objective.ranking.margin import Margin
from dist_obdsd.objective.ranking.multi_similarity import MultiSimilarity
from dist_obdsd.objective.ranking.pml import PytorchMetricLearning
from dist_obdsd.objective.ranking.proxy_anchor import ProxyAnchor
from dist_obdsd.objective.ranking.triplet import Triplet
from dist_obdsd.seeds import derive

__all__ = [
    "Contrastive",
    "Margin",
    "MultiSimilarity",
    "ProxyAnchor",
    "PytorchMetricLearning",
    "RankingLoss",
    "Triplet",
    "build_ranking",
]


def build_ranking(settings: config.Ranking, classes: int, embedding_dim: int, seed: int) -> RankingLoss:
    """The loss that ``ranking.name`` chooses, on the CPU.

    Args:
        classes: the number of training classes, C.
        embedding_dim: D.
        seed: the run's. Initial parameters depend on it and on nothing else.

    Raises:
        InputError: if a loss of pytorch-metric-learning cannot be had as asked for.
    """
    parameter_seed = derive(seed, "ranking parameters")
    match settings:
        case config.MultiSimilarity():
            return MultiSimilarity(settings)
        case config.Contrastive():
            return Contrastive(settings)
        case config.Triplet():
            return Triplet(settings)
        case config.Margin():
            return Margin(settings, classes)
        case config.ProxyAnchor():
            return ProxyAnchor(settings, classes, embedding_dim, torch.Generator().manual_seed(parameter_seed))
        case config.PytorchMetricLearning():
            with torch.random.fork_rng(devices=[]):
                torch.random.default_generator.manual_seed(parameter_seed)
                return PytorchMetricLearning(settings, classes, embedding_dim)
