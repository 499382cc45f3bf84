"""Weights that training begins with: a state dict's file, or a run of ours."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_obdsd import checkpoint
from dist_obdsd.errors import InputError

State = Mapping[str, torch.Tensor]
LIBRARIES = ("torchvision", "timm")
CLASSIFIERS = ("fc.", "classifier.", "head.", "heads.", "AuxLogits.", "aux")
"""Prefixes of what a classifier has beside the features; a file may have or lack them."""


def split_source(pretrained: str) -> tuple[str | None, str]:
    """Split ``model.pretrained`` into a library, None if it names none, and a tag."""
    source, _, tag = pretrained.partition(":")
    return (source, tag or "DEFAULT") if source in LIBRARIES else (None, "")


def read(pretrained: str) -> tuple[State | None, dict[str, Any] | None]:
    """Read a file's state dict or a checkpoint's content, or raise InputError."""
    if pretrained == "none" or split_source(pretrained)[0]:
        return None, None
    path = Path(pretrained).expanduser()
    if path.is_dir():
        return None, checkpoint.load(path)
    if not path.is_file():
        raise InputError(
            f"model.pretrained={pretrained} is no file and no run; give the path of a state dict, a run's folder, "
            f"torchvision, timm or none"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path), None
        state = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise InputError(f"model.pretrained={pretrained} needs safetensors; pip install safetensors") from error
    except Exception as error:
        reason = "it holds more than tensors" if isinstance(error, pickle.UnpicklingError) else str(error)
        raise InputError(
            f"model.pretrained={pretrained} is not a state dict: {next(iter(reason.splitlines()), '')[:200]}; give a "
            f".pth or .safetensors file of tensors"
        ) from error
    if isinstance(state, dict) and state.get("format") == checkpoint.FORMAT:
        return None, checkpoint.load(path)
    for key in ("state_dict", "model"):
        state = state.get(key, state) if isinstance(state, dict) else state
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not named or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"model.pretrained={pretrained} is not a state dict; give a file of tensors by their names")
    return state, None


def fit(net: nn.Module, state: State | None, backbone: str) -> Any:
    """Load a state dict, with or without a classifier, or raise InputError."""
    if state is None:
        return net
    own = net.state_dict()
    # A classifier of another number of classes is as good as none.
    fitting = {
        name: value for name, value in state.items()
        if not name.startswith(CLASSIFIERS) or own.get(name, value).shape == value.shape
    }  # fmt: skip
    try:
        unfit = net.load_state_dict(fitting, strict=False)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"model.pretrained does not fit {backbone}: {reason}") from error
    wrong = [[name for name in names if not name.startswith(CLASSIFIERS)] for names in unfit]
    if any(wrong):
        raise InputError(
            f"model.pretrained does not fit {backbone}: {len(wrong[0])} tensors are missing and {len(wrong[1])} "
            f"unknown, such as {(wrong[0] or wrong[1])[0]}; give the weights of a {backbone}"
        )
    return net
