"""Optimizers and learning rates.

The rate is a pure function of the position, so a resumed run has no scheduler state to restore.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from dist_obdsd.config import Config
from dist_obdsd.config.ranking import LearnableConfig
from dist_obdsd.config.sections import OptimConfig

logger = logging.getLogger(__name__)

OBJECTIVE_RATE = 100
"""Learning rate of the ranking loss's own parameters, in units of the student's, where the config leaves it open."""
RELEASED_RATE = 5e-4
"""That of the released code's margin loss, for ``ranking.conventions=released``."""

HEAD = "head."
"""Prefix of the names of the embedding layer's parameters."""

Named = tuple[str, torch.nn.Parameter]


def build_optimizer(
    config: OptimConfig, parameters: Iterable[Named], depths: Mapping[str, int] | None = None
) -> torch.optim.Optimizer:
    """Build the optimizer of trainable parameters, a group for each rate's scale.

    It is fused, since only the fused step can be masked on the device.

    Args:
        depths: number of each parameter's layer, for ``layer_decay``; the embedding layer's is the largest.
    """
    by_scale: dict[float, list[torch.nn.Parameter]] = {}
    for name, p in parameters:
        if p.requires_grad:
            by_scale.setdefault(rate_scale(config, name, depths), []).append(p)
    if depths and config.layer_decay < 1:
        scales = ", ".join(f"{scale:.3g}" for scale in by_scale)
        logger.info(f"optim.layer_decay={config.layer_decay}: rates from first to last layer: {scales} x optim.lr")
    groups = [{"params": members, "scale": scale} for scale, members in by_scale.items()]
    if config.name == "sgd":
        optimizer = torch.optim.SGD(
            groups, config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
        )
        if config.momentum:
            # The fused step leaves the buffer that it makes unwritten when the first step is masked; from 0 the first
            # step is the same as without a buffer.
            for p in (p for members in by_scale.values() for p in members):
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return optimizer
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.name]
    return kind(groups, config.lr, weight_decay=config.weight_decay, fused=True)


def rate_scale(config: OptimConfig, name: str, depths: Mapping[str, int] | None) -> float:
    """Compute a parameter's learning rate in units of ``config.lr``."""
    if name.startswith(HEAD):
        return config.head_scale
    return config.layer_decay ** (max(depths.values()) - depths[name]) if depths else 1.0


def build_objective_optimizer(config: Config, parameters: Sequence[Named]) -> torch.optim.Optimizer | None:
    """Build the optimizer of the ranking loss's own parameters, if there are any."""
    if not parameters:
        return None
    ranking, optim = config.ranking, config.optim
    assert isinstance(ranking, LearnableConfig), "a loss with parameters has settings for them"
    released = getattr(ranking, "conventions", "correct") == "released"
    rate = ranking.lr or (RELEASED_RATE if released else OBJECTIVE_RATE * optim.lr)
    optimizer = build_optimizer(optim.model_copy(update={"lr": rate, "weight_decay": ranking.weight_decay}), parameters)
    for group in optimizer.param_groups:  # whatever the parameters are called
        group["scale"] = rate / optim.lr
    return optimizer


def learning_rate(config: OptimConfig, epoch: int, epochs: int, epoch_share: float, global_step: int) -> float:
    """Compute the learning rate of one step.

    Args:
        epoch: from 0.
        epoch_share: share of this epoch's steps that are done, in [0, 1).
        global_step: optimizer steps done so far.
    """
    rate = config.lr
    if config.schedule == "step":
        rate *= config.gamma ** sum(epoch >= milestone for milestone in config.milestones)
    elif config.schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * (epoch + epoch_share) / epochs))
    if global_step < config.warmup_steps:
        rate *= (global_step + 1) / config.warmup_steps
    return rate


def state_by_name(optimizer: torch.optim.Optimizer | None, parameters: Iterable[Named]) -> dict[str, dict[str, Any]]:
    """Return the optimizer's state by parameter name, however these are grouped."""
    return {name: dict(optimizer.state[p]) for name, p in parameters if optimizer and p in optimizer.state}


def load_state_by_name(
    optimizer: torch.optim.Optimizer | None, parameters: Iterable[Named], state: dict[str, dict[str, Any]]
) -> None:
    """Restore what ``state_by_name`` gave, on each parameter's device and layout."""
    for name, p in parameters:
        if optimizer and name in state:
            optimizer.state[p] = {key: _placed_like(p, value) for key, value in state[name].items()}


def _placed_like(p: torch.Tensor, value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if value.shape != p.shape:
        return value.to(p.device)
    # The fused optimizers walk through the memory of weights and state side by side and do not look at strides.
    return torch.empty_like(p, dtype=value.dtype).copy_(value)
