"""The student: pixels to unit-norm embeddings.

Legend: b images, C channels, s pixels, F features, D embedding dimension.
"""

import logging

import torch
from torch import nn
from torch.nn import functional

from dist_obdsd.config import Config
from dist_obdsd.config.registry import BACKBONES
from dist_obdsd.config.sections import DataConfig, ModelConfig
from dist_obdsd.errors import InputError
from dist_obdsd.rng import derive

logger = logging.getLogger(__name__)


class Embedder(nn.Module):
    """The network from uint8 images [b, C, s, s] to unit rows [b, D], normalisation of the pixels included."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, config: ModelConfig, data: DataConfig) -> None:
        super().__init__()
        weights = config.torchvision_weights
        file = None if config.pretrained == "none" or weights else config.pretrained
        self.trunk, features = BACKBONES.build(config.backbone, {}, channels=data.channels, weights=weights, file=file)
        self.pooling = config.pooling
        self.head = nn.Linear(features, config.embedding_dim)
        self.freeze_statistics = config.norm == "frozen"
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        # Constants of the data, not state: kept out of checkpoints and of the teacher's comparison.
        shape = (1, -1, 1, 1)
        self.register_buffer("mean", torch.tensor(data.mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(data.std).view(shape), persistent=False)

    def train(self, mode: bool = True) -> "Embedder":
        super().train(mode)
        if self.freeze_statistics:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()  # the statistics stay; scale and shift are still learned
        return self

    def forward(self, images_bCss: torch.Tensor) -> torch.Tensor:
        x = images_bCss.to(self.mean.dtype, memory_format=self.layout).div(255)
        x = self.trunk((x - self.mean) / self.std)
        pooled_bF = {
            "avg": lambda: x.mean((2, 3)),
            "max": lambda: x.amax((2, 3)),
            "avg+max": lambda: x.mean((2, 3)) + x.amax((2, 3)),
        }[self.pooling]()
        E_bD = self.head(pooled_bF)
        # At least float32, also under autocast: a unit row in bf16 is off by up to 0.4 %.
        return functional.normalize(E_bD if E_bD.dtype == torch.float64 else E_bD.float(), dim=1)


def build_embedder(config: Config, device: torch.device) -> Embedder:
    """Build the freshly initialised network, the same on every rank.

    Its weights follow from a generator that is derived from the run's seed.

    Raises:
        InputError: pretrained weights that do not fit, SyncBatchNorm without a GPU, or a layer with dropout, whose
            mask would make results depend on the number of ranks.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(config.seed, "initial weights"))
        model = Embedder(config.model, config.data)
    dropout = [name for name, m in model.named_modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0]
    if dropout:
        raise InputError(f"{config.model.backbone} has dropout at {dropout[0]}, which ranks would draw differently")
    has_batch_norm = _has_batch_norm(model)
    if has_batch_norm and config.model.norm == "sync":
        if device.type != "cuda":
            raise InputError(
                "model.norm=sync needs GPUs, since torch has no SyncBatchNorm on CPU; set model.norm=frozen"
            )
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    dtype = torch.float64 if config.precision == "float64" else torch.float32
    return model.to(device=device, dtype=dtype).to(memory_format=model.layout)


def log_batch_norm(model: Embedder, config: ModelConfig, world_size: int) -> None:
    """Log where BatchNorm's statistics are not those that a user may expect."""
    if not _has_batch_norm(model):
        return
    if config.norm == "batch" and world_size > 1:
        logger.info(
            "model.norm=batch takes statistics per rank, so results depend on the number of ranks; frozen does not"
        )
    if config.norm == "frozen" and config.pretrained == "none":
        logger.info(
            "model.norm=frozen without pretrained weights keeps the initial statistics, so BatchNorm does nothing"
        )


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
