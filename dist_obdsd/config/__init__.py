"""Typed, strict configuration: a YAML file and dotted overrides become one frozen ``Config``."""

from dist_obdsd.config.load import changed_settings, load_config, override_config, parse_config
from dist_obdsd.config.ranking import (
    Contrastive,
    Learnable,
    Margin,
    MultiSimilarity,
    ProxyAnchor,
    PytorchMetricLearning,
    Ranking,
    Triplet,
)
from dist_obdsd.config.schema import Config
from dist_obdsd.config.sections import (
    SELECTION_METRIC,
    Batch,
    Checkpoint,
    Data,
    DeepSpeed,
    Distillation,
    Evaluation,
    Model,
    Optim,
    Tracking,
    Validation,
)

__all__ = [
    "SELECTION_METRIC",
    "Batch",
    "Checkpoint",
    "Config",
    "Contrastive",
    "Data",
    "DeepSpeed",
    "Distillation",
    "Evaluation",
    "Learnable",
    "Margin",
    "Model",
    "MultiSimilarity",
    "Optim",
    "ProxyAnchor",
    "PytorchMetricLearning",
    "Ranking",
    "Tracking",
    "Triplet",
    "Validation",
    "changed_settings",
    "load_config",
    "override_config",
    "parse_config",
]
