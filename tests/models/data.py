"""What the tests of networks share: settings, images and networks of them."""

import torch

from dist_obdsd.config import Config, override_config, parse_config
from dist_obdsd.models.embedder import Embedder, build_embedder

CPU = torch.device("cpu")


def settings(backbone: str, *overrides: str, side: int = 32) -> Config:
    raw = {
        "name": "x", "epochs": 2, "data": {"shards": "x", "image_size": side, "lanes": 1},
        "batch": {"global_size": 4}, "model": {"backbone": backbone, "embedding_dim": 8},
        "distillation": {"temperature": 0.1, "transition_temperature": 0.05}, "optim": {"lr": 1e-3},
    }  # fmt: skip
    return parse_config(override_config(raw, overrides), "x")


def build(backbone: str, *overrides: str, side: int = 32) -> Embedder:
    return build_embedder(settings(backbone, *overrides, side=side), CPU)


def pictures(config: Config) -> torch.Tensor:
    """uint8 [4, 3, h, w]: noise."""
    shape = (4, 3, *config.data.size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
