"""The student: pixels to unit-norm embeddings.

Legend: b images, C channels, h, w rows and columns, F features, D embedding dimension.
"""

import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from dist_obdsd import checkpoint
from dist_obdsd.config import Config, load_config
from dist_obdsd.config.sections import ModelConfig
from dist_obdsd.console import NOTICE
from dist_obdsd.distributed import collectives
from dist_obdsd.errors import InputError
from dist_obdsd.models import layers, weights
from dist_obdsd.models.backbones import build_backbone, layer_depths, library_weights, to_sync_batch_norm
from dist_obdsd.models.pooling import Pool
from dist_obdsd.rng import derive

logger = logging.getLogger(__name__)


class Embedder(nn.Module):
    """The network from uint8 images [b, C, h, w] to unit rows [b, D]."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        trunk: nn.Module,
        features: int,
        embedding_dim: int,
        *,
        pool: Pool | None = None,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        freeze_statistics: bool = True,
        channels_last: bool = True,
        checkpoint_blocks: bool = False,
    ) -> None:
        """
        Args:
            trunk: from normalised images to a map [b, F, h, w], tokens [b, n, F] or features [b, F].
            features, embedding_dim: F, D.
            mean, std: of the pixels scaled to [0, 1], one value or one a channel.
            freeze_statistics: keep BatchNorm's statistics in training.
            checkpoint_blocks: compute the activations inside of blocks again in the backward pass.
        """
        super().__init__()
        self.trunk, self.pool = trunk, pool or Pool("avg")
        self.head = nn.Linear(features, embedding_dim)
        self.freeze_statistics, self.checkpoint_blocks = freeze_statistics, checkpoint_blocks
        if checkpoint_blocks:
            layers.checkpoint_blocks(trunk)
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        # Constants of the data, not state: kept out of checkpoints and of the teacher's comparison.
        shape = (1, -1, 1, 1)
        self.register_buffer("mean", torch.tensor(mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(shape), persistent=False)
        self.register_load_state_dict_post_hook(_drop_caches)

    def train(self, mode: bool = True) -> "Embedder":
        super().train(mode)
        switch: Any = getattr(self.trunk, "set_grad_checkpointing", None)
        if self.checkpoint_blocks and switch is not None:
            switch(mode)
        if self.freeze_statistics:
            for layer in layers.batch_norms(self):
                layer.eval()  # the statistics stay; scale and shift are still learned
        return self

    def forward(self, images_bChw: torch.Tensor) -> torch.Tensor:
        x = images_bChw.to(self.mean.dtype, memory_format=self.layout).div(255)
        E_bD = self.head(self.pool(self.trunk((x - self.mean) / self.std)))
        # At least float32, also under autocast: a unit row in bf16 is off by up to 0.4 %.
        return functional.normalize(E_bD if E_bD.dtype == torch.float64 else E_bD.float(), dim=1)

    def layer_depths(self) -> dict[str, int]:
        """Number the layer of each parameter; the embedding layer is the last."""
        found = {f"trunk.{name}": depth for name, depth in layer_depths(self.trunk).items()}
        last = max(found.values(), default=-1) + 1
        return {name: found.get(name, last) for name, _ in self.named_parameters()}


def _drop_caches(model: nn.Module, _: object) -> None:
    """Clear what layers such as LeViT's attention made of their weights in evaluation."""
    mode = model.training
    model.train().train(mode)


def build_embedder(config: Config, device: torch.device) -> Embedder:
    """Build the network that training begins with, by the seed, or raise InputError."""
    section, data = config.model, config.data
    assert section.pooling
    assert data.mean
    assert data.std
    state, saved = weights.read(section.pretrained)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(config.seed, "initial weights"))
        trunk, pool, features = build_backbone(
            section.backbone, pretrained=section.pretrained, state=state, channels=data.channels, size=data.size,
            pooling=section.pooling,
        )  # fmt: skip
        model = Embedder(
            trunk, features, section.embedding_dim, pool=pool, mean=data.mean, std=data.std,
            freeze_statistics=section.norm == "frozen", channels_last=section.channels_last,
            checkpoint_blocks=section.checkpoint_blocks,
        )  # fmt: skip
    if saved is not None:
        _continue_from(model, saved, config)
    _freeze(model, section.freeze)
    if layers.batch_norms(model) and section.norm == "sync":
        if device.type != "cuda":
            raise InputError("model.norm=sync needs GPUs: torch has no SyncBatchNorm on CPU; set model.norm=frozen")
        model.trunk = to_sync_batch_norm(trunk)
    dtype = torch.float64 if config.precision == "float64" else torch.float32
    return model.train().to(device=device, dtype=dtype).to(memory_format=model.layout)


def with_fallback(config: Config) -> Config:
    """Take ``model.fallback`` where a backbone's weights cannot be had. Collective."""
    section, optim = config.model, config.optim
    failure = next(filter(None, collectives.gather_json(_lacks_weights(config))), None)
    if failure is None:
        return config
    # Nothing is pretrained now, so all layers take the rate of the one that never was.
    rate = {"lr": optim.lr * optim.head_scale, "head_scale": 1.0}
    logger.log(
        NOTICE, "%s; until then %s is trained from random weights (model.fallback), with optim.lr=%g", failure,
        section.fallback, rate["lr"],
    )  # fmt: skip
    model = section.model_copy(update={"backbone": section.fallback, "pretrained": "none"})
    return config.model_copy(update={"model": model, "optim": optim.model_copy(update=rate)})


def _lacks_weights(config: Config) -> str | None:
    """Say why a run with a fall-back goes without its weights, if it does."""
    section, folder = config.model, config.run_dir
    if section.fallback is None or section.library is None:
        return None
    with suppress(InputError):  # there is no such run yet
        begun = load_config(folder / "config.yaml").model
        if (begun.backbone, begun.pretrained) == (section.fallback, "none") and checkpoint.find(folder) is not None:
            return f"{folder} was begun without the weights of {section.backbone}; set another name to use them"
    found = library_weights(section.backbone, section.pretrained)
    try:
        if found.path() is None:
            build_backbone(section.backbone, pretrained=section.pretrained)
    except InputError as error:
        return str(error)
    return None


def _continue_from(model: Embedder, saved: dict[str, Any], config: Config) -> None:
    """Take over another run's weights, and its embedding layer if that is as long."""
    source, theirs = config.model.pretrained, saved["config"]
    for name in ("mean", "std"):
        ours = list(getattr(config.data, name))
        if (other := list(theirs["data"][name])) != ours:
            raise InputError(f"{source} was trained with data.{name}={other} but it is {ours} here; set it to the same")
    state = saved["student"]
    if state["head.weight"].shape != model.head.weight.shape:
        logger.info("%s has another model.embedding_dim, so the embedding layer begins anew", source)
        state = state | {f"head.{name}": value for name, value in model.head.state_dict().items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(
            f"{source} is of model.backbone={theirs['model']['backbone']}, which does not fit "
            f"{config.model.backbone}; set model.backbone and model.pooling as there"
        ) from error


def _freeze(model: Embedder, freeze: int | str) -> None:
    """Take the whole backbone, or its stem and first blocks, out of training."""
    if freeze == 0:
        return
    depths = model.layer_depths()
    last = max(depths.values()) - 1
    if isinstance(freeze, int) and freeze > last:
        raise InputError(f"model.freeze={freeze} but the backbone has {last} blocks; set model.freeze to at most that")
    deepest = freeze if isinstance(freeze, int) else last
    for name, p in model.named_parameters():
        p.requires_grad_(depths[name] > deepest)


def log_batch_norm(model: Embedder, config: ModelConfig, world_size: int) -> None:
    """Log where BatchNorm's statistics are not those that a user may expect."""
    if not layers.batch_norms(model):
        return
    if config.norm == "batch" and world_size > 1:
        logger.info("model.norm=batch takes statistics per rank, so results depend on the number of ranks")
    if config.norm == "frozen" and config.pretrained == "none":
        logger.info("model.norm=frozen without pretrained weights keeps the initial statistics: BatchNorm does nothing")
