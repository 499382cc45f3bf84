"""What the tests of the ranking losses share: batches, losses and sums.

Legend: B rows, C classes, D embedding dimension.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from dist_obdsd.config.ranking import SECTIONS, RankingConfig
from dist_obdsd.config.registry import LOSSES
from dist_obdsd.distributed import collectives
from dist_obdsd.distributed.collectives import gather_rows
from dist_obdsd.losses.base import RankingLoss
from dist_obdsd.losses.batch_view import BatchView, PartialMean
from dist_obdsd.losses.build import build_ranking
from tests.manifold.data import B, unit_rows

BATCHES = {
    "uneven": [0, 0, 0, 1, 2, 1, 3, 4, 5, 6, 3, 2],
    "one rank without an anchor": [0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 7, 8],
    "no anchor": list(range(B)),
}
"""Labels whose anchors lie unevenly over the ranks."""
LABELS = {"mixed": [0, 1, 0, 0, 2, 1, 3, 0, 4, 1, 2, 2], "some alone": BATCHES["one rank without an anchor"]}
CLASSES = 13
"""More than a batch holds."""
FEATURES = 9


def ranking(name: str, **settings: Any) -> RankingConfig:
    return SECTIONS[LOSSES.entry(name)](name=name, **settings)


def loss_of(settings: RankingConfig, D: int, seed: int = 0) -> RankingLoss:
    """In float64, with parameters that are not all alike."""
    loss = build_ranking(settings, CLASSES, D, seed).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return loss


def parts(
    loss: RankingLoss, E_BD: torch.Tensor, labels: list[int], rows: slice = slice(0, B), seed: int = 0
) -> dict[str, PartialMean]:
    return loss.partial_means(BatchView(E_BD[rows], E_BD, torch.tensor(labels), rows.start, seed))


def mean(terms: dict[str, PartialMean]) -> torch.Tensor:
    """What one process makes of the parts."""
    return sum((term.sum / term.count.clamp(min=1) for term in terms.values()), torch.zeros((), dtype=torch.float64))


class Embedder(nn.Module):
    """From features to unit rows of five dimensions, in float64."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, 5)).double()

    def forward(self, x_bF: torch.Tensor) -> torch.Tensor:
        return functional.normalize(self.layers(x_bF), dim=1)


def images(step: int = 0) -> torch.Tensor:
    return unit_rows(100 + step, B, FEATURES)


def own_rows() -> slice:
    b = B // collectives.world_size()
    return slice(collectives.rank() * b, (collectives.rank() + 1) * b)


def flat(tensors: Iterable[torch.Tensor]) -> np.ndarray:
    return np.concatenate([np.zeros(0), *(x.detach().numpy().ravel() for x in tensors)])


def backward(loss: torch.Tensor, student: nn.Module, parameters: Iterable[nn.Parameter] = ()) -> dict[str, Any]:
    """The loss, its mean over the ranks, DDP's gradient of the student, and that of the loss's own parameters."""
    loss.backward()
    W = collectives.world_size()
    return {
        "loss": loss.item(),
        "mean": collectives.sum_across(loss).item() / W,
        "gradient": flat(collectives.sum_across(p.grad) / W for p in student.parameters()),
        "parameters": flat(p.grad for p in parameters),
    }


def gather_without_gradient(x_b: torch.Tensor) -> torch.Tensor:
    """Gather rows, of which this rank's alone have a gradient."""
    x_B = gather_rows(x_b).detach().clone()
    x_B[own_rows()] = x_b
    return x_B


WAYS: dict[str, dict[str, Any]] = {
    "exact": {"gather_rows": gather_rows},
    "no gradient": {"gather_rows": gather_without_gradient},
    "local loss": {"world_size": lambda: 1, "rank": lambda: 0},
    "mean of rank means": {"sum_across": lambda x: x * collectives.world_size()},
}
"""What is done with several ranks, as functions in place of those of ``collectives``; all but the first are wrong."""


def patched(way: str) -> AbstractContextManager[Any]:
    return patch.multiple(collectives, **WAYS[way])


def relative_error(found: np.ndarray, expected: np.ndarray, least: float = 1e-300) -> float:
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), least))
