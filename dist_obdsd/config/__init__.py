"""Typed, strict configuration: a YAML file and dotted overrides become one frozen ``Config``."""

from dist_obdsd.config.load import changed_settings, load_config, override_config, parse_config
from dist_obdsd.config.ranking import (
    ContrastiveConfig,
    LearnableConfig,
    MarginConfig,
    MultiSimilarityConfig,
    ProxyAnchorConfig,
    PytorchMetricLearningConfig,
    RankingConfig,
    TripletConfig,
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
    "ContrastiveConfig",
    "DataConfig",
    "DeepSpeedConfig",
    "DistillationConfig",
    "EvaluationConfig",
    "LearnableConfig",
    "MarginConfig",
    "ModelConfig",
    "MultiSimilarityConfig",
    "OptimConfig",
    "ProxyAnchorConfig",
    "PytorchMetricLearningConfig",
    "RankingConfig",
    "TrackingConfig",
    "TripletConfig",
    "ValidationConfig",
    "changed_settings",
    "load_config",
    "override_config",
    "parse_config",
]
