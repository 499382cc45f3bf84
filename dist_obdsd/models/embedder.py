"""The student: pixels to unit-norm embeddings.

Legend: b images, C channels, s pixels, F features, D embedding dimension.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torchvision import models

from dist_obdsd.config import Config, DataConfig, ModelConfig
from dist_obdsd.errors import InputError
from dist_obdsd.rng import derive


class SmallCNN(nn.Module):
    """Four 3 x 3 convolutions for small images. GroupNorm, so that no batch statistics tie rows to ranks."""

    widths = (48, 64, 96, 128)

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in self.widths:
            layers += [
                nn.Conv2d(channels, width, 3, padding=1, bias=False),
                nn.GroupNorm(8, width),
                nn.MaxPool2d(2),
                nn.ReLU(inplace=True),  # after the pooling, with which it commutes, it has a quarter of the work
            ]
            channels = width
        del layers[-2]  # the last map is pooled globally, so it keeps its resolution
        self.layers = nn.Sequential(*layers)

    def forward(self, images_bCss: torch.Tensor) -> torch.Tensor:
        return self.layers(images_bCss)


def _trunk(config: ModelConfig, channels: int) -> tuple[nn.Module, int]:
    """The backbone without its pooling and classifier, and its number of features F."""
    net: Any
    if config.backbone == "small_cnn":
        net = SmallCNN(channels)
    else:
        net = _quietly(lambda: models.get_model(config.backbone, weights=_published_weights(config)))
    if config.pretrained != "none" and config.torchvision_weights is None:
        _load_weights(net, config.pretrained, config.backbone)
    if config.backbone == "small_cnn":
        return net, SmallCNN.widths[-1]
    if config.backbone.startswith("squeezenet"):
        return net.features, 512
    features = net.fc.in_features
    return nn.Sequential(*list(net.children())[:-2]), features


def _published_weights(config: ModelConfig) -> models.WeightsEnum | None:
    name = config.torchvision_weights
    if name is None:
        return None
    known = models.get_model_weights(config.backbone)
    if name not in known.__members__:
        names = ", ".join(weights.name for weights in known)
        raise InputError(
            f"model.pretrained={config.pretrained}: torchvision has {names} for {config.backbone}; give one of "
            f"these, or torchvision for the newest"
        )
    return known[name]


def _quietly(make: Callable[[], nn.Module]) -> nn.Module:
    # SqueezeNet's constructor warns about nothing that we use; its classifier is dropped.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return make()


def _load_weights(net: nn.Module, path: str, backbone: str) -> None:
    """Load a plain state dict with the backbone's own names; the classifier's may be missing, since it is dropped."""
    if not Path(path).is_file():
        raise InputError(f"model.pretrained={path} is no file; give a state dict's path, torchvision or none")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        unfit = net.load_state_dict(state, strict=False)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"model.pretrained={path} is not a state dict for {backbone}: {reason}") from error
    missing = [name for name in unfit.missing_keys if not name.startswith(("fc.", "classifier."))]
    if missing or unfit.unexpected_keys:
        example = (missing or list(unfit.unexpected_keys))[0]
        raise InputError(
            f"model.pretrained={path} does not fit {backbone}: {len(missing)} tensors are missing and "
            f"{len(unfit.unexpected_keys)} unknown, such as {example}; give the weights of a {backbone}"
        )


class Embedder(nn.Module):
    """uint8 images [b, C, s, s] to unit rows [b, D]; scaling and normalisation of the pixels included."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, config: ModelConfig, data: DataConfig) -> None:
        super().__init__()
        self.trunk, features = _trunk(config, data.channels)
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


def build_embedder(config: Config, device: torch.device, warn: Callable[[str], None], world_size: int = 1) -> Embedder:
    """The freshly initialised network: the same on every rank, since its generator is derived from the run's seed.

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
    has_batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if has_batch_norm and config.model.norm == "sync":
        if device.type != "cuda":
            raise InputError(
                "model.norm=sync needs GPUs, since torch has no SyncBatchNorm on CPU; set model.norm=frozen"
            )
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if has_batch_norm and config.model.norm == "batch" and world_size > 1:
        warn("model.norm=batch takes statistics per rank, so results depend on the number of ranks; frozen does not")
    if has_batch_norm and config.model.norm == "frozen" and config.model.pretrained == "none":
        warn("model.norm=frozen without pretrained weights keeps the initial statistics, so BatchNorm does nothing")
    dtype = torch.float64 if config.precision == "float64" else torch.float32
    return model.to(device=device, dtype=dtype).to(memory_format=model.layout)
