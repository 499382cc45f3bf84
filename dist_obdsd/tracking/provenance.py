"""What a run was made from, for the record."""

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


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def versions() -> dict[str, str]:
    import torchvision  # takes more than a second, which who only asks for the hardware does without

    return {
        "version.dist_obdsd": dist_obdsd.__version__,
        "version.torch": torch.__version__,
        "version.torchvision": torchvision.__version__,
        "version.python": platform.python_version(),
        "command": " ".join(sys.argv),
    }


def hardware(device: torch.device) -> str:
    """What a rank computes on, such as ``NVIDIA H100 80GB HBM3`` or a processor with its usable cores."""
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
    """The commit that the working folder is at, and whether it has uncommitted changes; ``unknown`` without git."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        answer = ""
    if not answer:
        return {"git_commit": "unknown", "git_dirty": "unknown"}
    return {"git_commit": answer.removesuffix("-dirty"), "git_dirty": str(answer.endswith("-dirty")).lower()}


def dataset(manifest: Manifest, shards: str) -> dict[str, Any]:
    """What ``Tracker.dataset`` is told of the data."""
    splits = {
        name: {"images": manifest.images(name), "classes": len(manifest.class_ids(name))} for name in manifest.splits
    }
    source = shown(shards) if is_remote(shards) else str(Path(shards).absolute())
    return {
        "name": str(manifest.recipe.get("name", "shards")),
        "digest": manifest.digest,
        "source": source,
        "profile": {"splits": splits},
    }
