"""Provenance of a run: code, versions, hardware and data."""

import contextlib
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import dist_obdsd
from dist_obdsd.data.manifest import Manifest
from dist_obdsd.data.remote import is_remote, shown
from dist_obdsd.machine import usable_cores


def versions() -> dict[str, str]:
    import torchvision  # takes more than a second

    return {
        "version.dist_obdsd": dist_obdsd.__version__,
        "version.torch": torch.__version__,
        "version.torchvision": torchvision.__version__,
        "version.python": platform.python_version(),
        "command": " ".join(sys.argv),
    }


def hardware(device: torch.device) -> str:
    """Name a rank's GPU, or its processor with the number of usable cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {usable_cores()} cores"


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git() -> dict[str, str]:
    """Return the working folder's commit and whether it is dirty, or ``unknown``."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]  # with no tag's name
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if answer := subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip():
            dirty = answer.endswith("-dirty")
            return {"git_commit": answer.removesuffix("-dirty"), "git_dirty": str(dirty).lower()}
    return {"git_commit": "unknown", "git_dirty": "unknown"}


def dataset(manifest: Manifest, shards: str) -> dict[str, Any]:
    """Return the arguments of ``Tracker.dataset``."""
    splits = {
        name: {"images": manifest.images(name), "classes": len(manifest.class_ids(name))} for name in manifest.splits
    }
    source = shown(shards) if is_remote(shards) else str(Path(shards).absolute())
    name = str(manifest.recipe.get("name", "shards"))
    return {"name": name, "digest": manifest.digest, "source": source, "profile": {"splits": splits}}
