"""Distributed deep metric learning with self-distillation and online diffusion."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_obdsd.data.balanced_stream import BalancedStream
    from dist_obdsd.data.sampler import BalancedBatchSampler
    from dist_obdsd.distributed.collectives import all_gather_rows
    from dist_obdsd.evaluation.evaluator import evaluate
    from dist_obdsd.inference import load
    from dist_obdsd.losses.across_ranks import LossOutput
    from dist_obdsd.losses.base import RankingLoss
    from dist_obdsd.losses.contrastive import ContrastiveLoss
    from dist_obdsd.losses.margin import MarginLoss
    from dist_obdsd.losses.multi_similarity import MultiSimilarityLoss
    from dist_obdsd.losses.obdsd import OBDSDLoss
    from dist_obdsd.losses.pml import PMLLoss
    from dist_obdsd.losses.proxy_anchor import ProxyAnchorLoss
    from dist_obdsd.losses.triplet import TripletLoss
    from dist_obdsd.manifold.targets import diffusion_targets
    from dist_obdsd.models.teacher import ProgressiveTeacher

__version__ = "0.2.0"

_MODULES = {
    "BalancedBatchSampler": "data.sampler",
    "BalancedStream": "data.balanced_stream",
    "ContrastiveLoss": "losses.contrastive",
    "LossOutput": "losses.across_ranks",
    "MarginLoss": "losses.margin",
    "MultiSimilarityLoss": "losses.multi_similarity",
    "OBDSDLoss": "losses.obdsd",
    "PMLLoss": "losses.pml",
    "ProgressiveTeacher": "models.teacher",
    "ProxyAnchorLoss": "losses.proxy_anchor",
    "RankingLoss": "losses.base",
    "TripletLoss": "losses.triplet",
    "all_gather_rows": "distributed.collectives",
    "diffusion_targets": "manifold.targets",
    "evaluate": "evaluation.evaluator",
    "load": "inference",
}
"""Public name -> its module, imported when the name is first used: torch alone takes seconds."""

__all__ = ["__version__", *_MODULES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
