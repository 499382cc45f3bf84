"""The training step's bench at the sizes that the targets are stated for."""

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmarks import step
from benchmarks.common import Row
from dist_obdsd.errors import RunError
from tests.gpu.rig import Skipped

VIT = "timm/vit_small_patch16_224"
CASES = {
    "resnet50-112": ("resnet50", 112, []),
    "resnet50-448": ("resnet50", 448, []),
    "vit-small-112": (VIT, 112, ["--temperatures", "0.005"]),
    "resnet50-448-compiled": ("resnet50", 448, ["--temperatures", "0.05", "--compile"]),
}
"""Backbone, batch and more arguments; the last one compiles for a minute or more. ``obdsd 0.005`` is SOP's setting."""
BUDGET = 24.0
"""Seconds of a case, besides what starting takes."""


def measure(backbone: str, batch: int, more: Sequence[str], device: torch.device, quick: bool) -> list[Row]:
    """A row for each variant, 224 pixels in bf16, or something tiny."""
    if quick:
        backbone, batch, more = "small_cnn", 8, []
    if backbone == VIT and importlib.util.find_spec("timm") is None:
        raise Skipped("timm is not installed; pip install timm")
    arguments = [
        "--worlds", "1", "--precision", "bf16", "--backbone", backbone, "--image-size", "16" if quick else "224",
        "--batch", str(batch), "--budget", str(1.0 if quick else BUDGET), *more,
    ]  # fmt: skip
    about = {"backbone": backbone.rpartition("/")[2], "compiled": "--compile" in more}
    try:
        rows = step.run(step.parser().parse_args(arguments))
    except RunError as error:
        if "out of memory" in str(error).lower():
            raise Skipped("this GPU has too little memory for it") from error
        raise
    if "skipped" in rows[0]:
        raise RunError(str(rows[0]["skipped"]))
    return [about | row | {"objective share": row["objective"] / row["ms"]} for row in rows]


CHECKS: dict[str, Callable[[torch.device, bool], list[Row]]] = {
    name: partial(measure, *case) for name, case in CASES.items()
}
