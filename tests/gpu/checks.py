"""The checks by part and name, and what they run on. Each check returns what it found, as a text or as rows."""

import datetime
import importlib
import importlib.metadata
import platform
from collections.abc import Callable
from typing import Any

import torch

from dist_obdsd.tracking import provenance

Check = Callable[[torch.device, bool], str | list[dict[str, Any]]]


def checks(part: str) -> dict[str, Check]:
    """The checks of a part by name, cheap ones first."""
    found: dict[str, Check] = importlib.import_module(f"tests.gpu.{part}").CHECKS
    return found


def about(device: torch.device) -> dict[str, Any]:
    """Describe the device and the software."""
    described: dict[str, Any] = {"date": datetime.date.today().isoformat(), "device": provenance.hardware(device)}
    described |= {"commit": provenance.git()["git_commit"][:12], "python": platform.python_version()}
    described |= {name: importlib.metadata.version(name) for name in ("torch", "torchvision")}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        described |= {"gpus": torch.cuda.device_count(), "memory_gib": round(properties.total_memory / 2**30, 1)}
    return described
