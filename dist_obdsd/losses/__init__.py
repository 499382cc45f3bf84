"""The ranking losses: how a batch's embeddings should lie with respect to its labels."""

import torch

from dist_obdsd.config import (
    ContrastiveConfig,
    MarginConfig,
    MultiSimilarityConfig,
    ProxyAnchorConfig,
    PytorchMetricLearningConfig,
    RankingConfig,
    TripletConfig,
)
from dist_obdsd.losses.base import RankingLoss
from dist_obdsd.losses.contrastive import Contrastive
from dist_obdsd.losses.margin import Margin
from dist_obdsd.losses.multi_similarity import MultiSimilarity
from dist_obdsd.losses.pml import PytorchMetricLearning
from dist_obdsd.losses.proxy_anchor import ProxyAnchor
from dist_obdsd.losses.triplet import Triplet
from dist_obdsd.rng import derive

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


def build_ranking(config: RankingConfig, classes: int, embedding_dim: int, seed: int) -> RankingLoss:
    """The loss that ``ranking.name`` chooses, on the CPU.

    Args:
        classes: the number of training classes, C.
        embedding_dim: D.
        seed: the run's. Initial parameters depend on it and on nothing else.

    Raises:
        InputError: if a loss of pytorch-metric-learning cannot be had as asked for.
    """
    parameter_seed = derive(seed, "ranking parameters")
    match config:
        case MultiSimilarityConfig():
            return MultiSimilarity(config)
        case ContrastiveConfig():
            return Contrastive(config)
        case TripletConfig():
            return Triplet(config)
        case MarginConfig():
            return Margin(config, classes)
        case ProxyAnchorConfig():
            return ProxyAnchor(config, classes, embedding_dim, torch.Generator().manual_seed(parameter_seed))
        case PytorchMetricLearningConfig():
            with torch.random.fork_rng(devices=[]):
                torch.random.default_generator.manual_seed(parameter_seed)
                return PytorchMetricLearning(config, classes, embedding_dim)
