"""Typed, strict configuration: a YAML file and dotted overrides become one frozen ``Config``."""

from dist_obdsd.config.load import changed_settings, load_config, override_config, parse_config
from dist_obdsd.config.ranking import (
    LearnableConfig,
    RankingConfig,
)
from dist_obdsd.config.schema import Config
from dist_obdsd.config.sections import (
    SELECTION_METRIC,
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    DeepSpeedConfig,
    DistillationConfig,
    EvaluationConfig,
    ModelConfig,
    OptimConfig,
    TrackingConfig,
    ValidationConfig,
)

__all__ = [
    "SELECTION_METRIC",
    "BatchConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DeepSpeedConfig",
    "DistillationConfig",
    "EvaluationConfig",
    "LearnableConfig",
    "ModelConfig",
    "OptimConfig",
    "RankingConfig",
    "TrackingConfig",
    "ValidationConfig",
    "changed_settings",
    "load_config",
    "override_config",
    "parse_config",
]
