"""Losses and gradients of one step, in several ways, beside float64 on the CPU."""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common import run_case
from dist_obdsd.distributed import collectives
from dist_obdsd.distributed.launch import Runtime
from tests.gpu.rig import (
    CPU,
    CheckError,
    Gradients,
    Numbers,
    Rig,
    Skipped,
    convolutions_in_float32,
    distance,
    settings,
    within,
)
from tests.gpu.smoke import LIMIT

LIMITS = {
    ("small_cnn", "float32"): (1e-4, 1e-4),
    ("small_cnn", "tf32"): (2e-2, 1e-1),
    ("small_cnn", "bf16"): (1e-1, 1.5e-1),
    ("resnet18", "float32"): (1e-3, 2e-2),
    ("resnet18", "tf32"): (5e-2, 5e-1),
    ("resnet18", "bf16"): (2e-1, 8e-1),
}
"""Of the losses' and of the gradient's relative error. On a CPU the gradient's was 1.5e-6 and 3.5e-2 in the small CNN,
1.4e-3 and 3.6e-1 in ResNet-18, whose untrained layers amplify rounding; tf32 lies between the two."""
TARGETS = ("none", "obdsd")


def step_is_exact(device: torch.device, quick: bool, ways: Sequence[str] = ()) -> str:
    """Losses and gradients of one step beside those of the same step in float64 on the CPU.

    Args:
        ways: settings that change no number, each by itself; without any, all targets and precisions.
    """
    if "model.compile=true" in ways and quick and device.type == "cpu":
        raise Skipped("compiling for a CPU takes half a minute; it is checked without --quick")
    precisions = ("float32",) if ways else ("float32", "bf16", *(["tf32"] if device.type == "cuda" else []))
    targets = ("obdsd",) if ways else ("none", "psd", "obdsd", "obdsd_symmetric")
    said = []
    for backbone in ("small_cnn",) if quick else ("small_cnn", "resnet18"):
        for target in targets:
            wanted, wanted_gradients = _one_step(CPU, backbone, f"distillation.target={target}", "precision=float64")
            for precision, way in itertools.product(precisions, ways or [f"distillation.target={target}"]):
                with convolutions_in_float32(precision == "float32"):
                    wide = "bf16" if precision == "bf16" else "float32"
                    numbers, gradients = _one_step(device, backbone, way, f"precision={wide}")
                (losses, slopes), case = LIMITS[backbone, precision], f"{backbone} {way.partition('=')[2]} {precision}"
                for name in [name for name in ("ranking", "distillation") if name in wanted]:
                    within(f"{case}: error of {name}", abs(numbers[name] / wanted[name] - 1), losses)
                error = within(f"{case}: error of the gradient", distance(gradients, wanted_gradients), slopes)
                said += [error] * (target == "obdsd")
    return "; ".join(said)


def _one_step(device: torch.device, backbone: str, *overrides: str) -> tuple[Numbers, Gradients]:
    rig = Rig(settings(backbone, *overrides), device)
    numbers = rig.numbers()
    if numbers["masked"]:
        raise CheckError(f"the step with {', '.join(overrides)} was masked")
    return numbers, rig.gradients


def ranks_are_one_batch(device: torch.device, quick: bool) -> str:
    """The gradient of a step on all visible GPUs (on two CPU ranks) beside one process with the whole batch."""
    world = torch.cuda.device_count() if device.type == "cuda" else 2
    world = max(W for W in (1, 2, 4, 8, 16) if world >= W)  # such as divide the batch
    if world == 1:
        raise Skipped("there is one GPU")
    (answer,) = run_case(run_rank, world, {"device": device.type, "threads": 1})
    if "skipped" in answer:
        raise CheckError(f"{world} ranks: {answer['skipped']}")
    said = [within(f"gradient of {target}", error, LIMIT) for target, error in answer.items()]
    return f"{'NCCL' if device.type == 'cuda' else 'gloo'}, {world} ranks: {'; '.join(said)}"


def run_rank(rank: Runtime, case: dict[str, Any]) -> dict[str, float]:
    """The largest error of all ranks, by target. Collective."""
    found = collectives.gather_json({target: error(rank, f"distillation.target={target}") for target in TARGETS})
    return {target: max(one[target] for one in found) for target in TARGETS}


def error(rank: Runtime, *overrides: str, alone: Sequence[str] = ()) -> float:
    """Of the ranks' gradient beside that of this process alone with the whole batch. Collective.

    Args:
        alone: further settings of the process alone.
    """
    groups = [dist.new_group([number]) for number in range(rank.world_size)]
    with convolutions_in_float32():
        with collectives.within(groups[rank.rank]):
            one = Rig(settings("small_cnn", *overrides, *alone), rank.device)
            one.objective.group = groups[rank.rank]
            one.take()
        rig = Rig(settings("small_cnn", *overrides), rank.device, rank)
        rig.take()
    return distance(rig.gradients, one.gradients)


CHECKS = {
    "layout": partial(step_is_exact, ways=("model.channels_last=false", "batch.chunk=8")),
    "exact": step_is_exact,
    "ranks": ranks_are_one_batch,
    "compiled": partial(step_is_exact, ways=("model.compile=true",)),
}
