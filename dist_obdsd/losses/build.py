"""The objective of a run, from its config."""

import logging
from collections.abc import Sequence

import torch

from dist_obdsd.config import Config
from dist_obdsd.config.ranking import RankingConfig
from dist_obdsd.config.registry import LOSSES
from dist_obdsd.config.sections import DistillationConfig
from dist_obdsd.losses.base import RankingLoss
from dist_obdsd.losses.obdsd import OBDSDLoss
from dist_obdsd.manifold.diffusion import Diffusion
from dist_obdsd.manifold.solvers import choose_solver
from dist_obdsd.rng import derive

logger = logging.getLogger(__name__)


def build_ranking(config: RankingConfig, classes: int, embedding_dim: int, seed: int) -> RankingLoss:
    """Build the loss that ``ranking.name`` chooses, on the CPU.

    Args:
        classes: the number of training classes.
        seed: the run's. Initial parameters depend on it and on nothing else.

    Raises:
        InputError: the loss is unknown or cannot take its arguments.
    """
    takes = {setting.name for setting in LOSSES.source(config.name).settings}
    settings = {name: value for name, value in config if name in takes}
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(derive(seed, "ranking parameters"))
        loss: RankingLoss = LOSSES.build(config.name, settings, classes=classes, embedding_dim=embedding_dim)
    return loss


def build_objective(config: Config, classes: Sequence[int], device: torch.device) -> OBDSDLoss:
    """Build a run's objective with initial parameters, the same on every rank."""
    ranking = build_ranking(config.ranking, len(classes), config.model.embedding_dim, config.seed)
    dtype = torch.float64 if config.precision == "float64" else torch.float32
    return distilled(ranking.to(device=device, dtype=dtype), config.distillation)


def distilled(ranking: RankingLoss, section: DistillationConfig) -> OBDSDLoss:
    """Combine a ranking loss with the distillation that the section describes."""
    # The network makes unit rows and the stream known labels, so only the sizes of the first step are checked.
    return OBDSDLoss(
        ranking, weight=section.weight, scope=section.scope, memory=section.memory, validate=False,
        **vars(Diffusion.of(section)),
    )  # fmt: skip


def log_objective(config: Config, world_size: int) -> None:
    """Log what depends on a run's sizes, or raise InputError as ``choose_solver``."""
    B, section = config.batch.global_size, config.distillation
    own = B // world_size
    if section.scope == "rank" and world_size > 1:
        logger.info(f"distillation.scope=rank: {world_size} manifolds of {own} images, so results depend on the ranks")
    if section.diffuses:
        nodes = (own if section.scope == "rank" else B) + section.memory
        solver = choose_solver(nodes, own, Diffusion.of(section), 8 if config.precision == "float64" else 4)
        logger.debug(f"diffusion over {nodes} images for {own} rows a rank: {solver}")
