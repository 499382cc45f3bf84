"""The training step's bench at the sizes that the targets are stated for."""

import importlib.util
from argparse import Namespace
from collections.abc import Callable, Sequence

import torch

from benchmarks import step
from benchmarks.common import Row
from dist_obdsd.errors import RunError
from tests.gpu.rig import Skipped

VIT = "timm/vit_small_patch16_224"
CASES = {
    "resnet50-112": ("resnet50", 112, (1.0, 0.05, 0.005)),
    "resnet50-448": ("resnet50", 448, (1.0, 0.05, 0.005)),
    "vit-small-112": (VIT, 112, (0.005,)),
    "resnet50-448-compiled": ("resnet50", 448, (0.05,), "model.compile=true"),
}
"""Backbone, batch, transition temperatures of ``obdsd``, of which 0.005 is SOP's, and settings; the last one compiles
for a minute or more."""
BUDGET = 24.0
"""Seconds of a case, besides what starting takes."""


def measure(
    backbone: str, batch: int, temperatures: Sequence[float], *settings: str, device: torch.device, quick: bool
) -> list[Row]:
    """A row for each variant, 224 pixels in bf16, or something tiny."""
    if quick:
        backbone, batch, settings = "small_cnn", 8, ("data.image_size=16",)
    if backbone == VIT and importlib.util.find_spec("timm") is None:
        raise Skipped("timm is not installed; pip install timm")
    options = Namespace(
        worlds=[1], threads=1, budget=1.0 if quick else BUDGET, batch=batch, temperatures=temperatures, trace=None,
        settings=["precision=bf16", f"model.backbone={backbone}", *settings],
    )  # fmt: skip
    try:
        rows = step.run(options)
    except RunError as error:
        if "out of memory" in str(error).lower():
            raise Skipped("this GPU has too little memory for it") from error
        raise
    if "skipped" in rows[0]:
        raise RunError(str(rows[0]["skipped"]))
    about = {"backbone": backbone.rpartition("/")[2]}
    return [about | row | {"objective share": row["objective"] / row["ms"]} for row in rows]


CHECKS: dict[str, Callable[[torch.device, bool], list[Row]]] = {
    name: lambda device, quick, case=case: measure(*case, device=device, quick=quick) for name, case in CASES.items()
}
