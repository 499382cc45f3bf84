"""The backbones: networks without their pooling and classifier.

A builder returns the network and its number of features F. What it takes says what it can do: ``channels`` other than
RGB, published ``weights`` by torchvision's name, and the ``file`` of a state dict.

Legend: b images, C channels, s pixels.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision import models

from dist_obdsd.errors import InputError


class SmallCNN(nn.Module):
    """Four 3 x 3 convolutions for small images, with GroupNorm, which ties no rows to ranks."""

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


def small_cnn(*, channels: int, file: str | None) -> tuple[nn.Module, int]:
    """Four convolutions with GroupNorm, for small images of one or three channels."""
    net = SmallCNN(channels)
    load_weights(net, "small_cnn", file)
    return net, SmallCNN.widths[-1]


def resnet18(*, weights: str | None, file: str | None) -> tuple[nn.Module, int]:
    """ResNet with 18 layers (He et al., CVPR 2016)."""
    return _resnet("resnet18", weights, file)


def resnet34(*, weights: str | None, file: str | None) -> tuple[nn.Module, int]:
    """ResNet with 34 layers (He et al., CVPR 2016)."""
    return _resnet("resnet34", weights, file)


def resnet50(*, weights: str | None, file: str | None) -> tuple[nn.Module, int]:
    """ResNet with 50 layers (He et al., CVPR 2016)."""
    return _resnet("resnet50", weights, file)


def squeezenet1_0(*, weights: str | None, file: str | None) -> tuple[nn.Module, int]:
    """SqueezeNet 1.0 (Iandola et al., arXiv 1602.07360), which has no BatchNorm."""
    return _torchvision("squeezenet1_0", weights, file).features, 512


def _resnet(name: str, weights: str | None, file: str | None) -> tuple[nn.Module, int]:
    net = _torchvision(name, weights, file)
    return nn.Sequential(*list(net.children())[:-2]), net.fc.in_features


def _torchvision(name: str, weights: str | None, file: str | None) -> Any:
    with warnings.catch_warnings():
        # SqueezeNet's constructor warns about its classifier, which is dropped.
        warnings.simplefilter("ignore", UserWarning)
        net = models.get_model(name, weights=published_weights(name, weights))
    load_weights(net, name, file)
    return net


def published_weights(backbone: str, name: str | None) -> models.WeightsEnum | None:
    """Find torchvision's weights by name.

    Raises:
        InputError: there are none of that name.
    """
    if name is None:
        return None
    known = models.get_model_weights(backbone)
    if name not in known.__members__:
        names = ", ".join(weights.name for weights in known)
        raise InputError(
            f"model.pretrained=torchvision:{name}: torchvision has {names} for {backbone}; give one of these, or "
            f"torchvision for the newest"
        )
    return known[name]


def load_weights(net: nn.Module, backbone: str, path: str | None) -> None:
    """Load a plain state dict with the backbone's own names, if a path is given.

    The classifier's tensors may be missing, since it is dropped.

    Raises:
        InputError: there is no such file, or it does not fit.
    """
    if path is None:
        return
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
