"""Losses and gradients beside float64 on the CPU, and of one step beside itself in another way."""

import tempfile
from typing import Any

import torch

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
SECONDS = 60.0


def step_is_exact(device: torch.device, quick: bool) -> str:
    """Losses and gradients of one step beside those of the same step in float64 on the CPU."""
    found = []
    for backbone in ("small_cnn",) if quick else ("small_cnn", "resnet18"):
        for variant in ("none", "psd", "obdsd", "obdsd_symmetric"):
            target = f"distillation.target={variant}"
            wanted, wanted_gradients = _one_step(CPU, backbone, target, "precision=float64")
            for precision in ("float32", "bf16", *(["tf32"] if device.type == "cuda" else [])):
                more = [target, f"precision={'bf16' if precision == 'bf16' else 'float32'}"]
                with convolutions_in_float32(precision == "float32"):
                    numbers, gradients = _one_step(device, backbone, *more)
                losses, slopes = LIMITS[backbone, precision]
                for name in [name for name in ("ranking", "distillation") if name in wanted]:
                    error = abs(numbers[name] - wanted[name]) / abs(wanted[name])
                    within(f"{backbone} {variant} {precision}: error of {name}", error, losses)
                error = distance(gradients, wanted_gradients)
                said = within(f"{backbone} {variant} {precision}: error of the gradient", error, slopes)
                if variant == "obdsd":
                    found.append(said.replace("error of the ", ""))
    return "; ".join(found)


def _one_step(device: torch.device, backbone: str, *overrides: str) -> tuple[Numbers, Gradients]:
    rig = Rig(settings(backbone, *overrides), device)
    numbers = rig.numbers()
    if numbers["masked"]:
        raise CheckError(f"the step with {', '.join(overrides)} was masked")
    return numbers, rig.gradients


def layout_and_chunks_change_nothing(device: torch.device, quick: bool) -> str:
    """channels_last beside contiguous images, chunks beside a whole batch: one gradient. And the memory they take."""
    backbone = "small_cnn" if quick else "resnet18"
    gradients, peaks = {}, {}
    for way, overrides in {
        "plain": [], "contiguous": ["model.channels_last=false"], "chunks": ["batch.chunk=8"]
    }.items():  # fmt: skip
        with convolutions_in_float32():
            rig = Rig(settings(backbone, *overrides), device)
            rig.take()
            gradients[way] = rig.gradients
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                rig.take()
                peaks[way] = torch.cuda.max_memory_allocated() >> 20
    slopes = LIMITS[backbone, "float32"][1]
    said = [
        within(f"{backbone} {way}: difference", distance(gradients[way], gradients["plain"]), slopes)
        for way in ("contiguous", "chunks")
    ]
    if peaks:
        said.append(f"peak {peaks['plain']} MiB at once, {peaks['chunks']} MiB in chunks")
    return "; ".join(said)


def compiled_step_is_the_same(device: torch.device, quick: bool) -> str:
    """The gradient of a compiled student that learns from a compiled teacher, beside that of both as they are."""
    if quick and device.type == "cpu":
        raise Skipped("compiling for a CPU takes half a minute; it is checked without --quick")
    backbone = "small_cnn" if quick else "resnet18"
    with convolutions_in_float32():
        plain, compiled = (
            _one_step(device, backbone, "precision=float32", f"model.compile={choice}") for choice in ("false", "true")
        )
    losses, slopes = LIMITS[backbone, "float32"]
    error = abs(compiled[0]["distillation"] / plain[0]["distillation"] - 1)
    said = within(f"{backbone}: difference of the distillation", error, losses)
    return f"{said}; {within('of the gradient', distance(compiled[1], plain[1]), slopes)}"


def ranks_are_one_batch(device: torch.device, quick: bool) -> str:
    """The gradient of a step on all visible GPUs (on two CPU ranks) beside one process with the whole batch."""
    world = torch.cuda.device_count() if device.type == "cuda" else 2
    world = max(W for W in (1, 2, 4, 8, 16) if world >= W)  # such as divide the batch
    if world == 1:
        raise Skipped("there is one GPU")
    variants = {variant: f"distillation.target={variant}" for variant in ("none", "obdsd")}
    with tempfile.TemporaryDirectory() as folder, convolutions_in_float32():
        for variant, target in variants.items():
            alone = Rig(settings("small_cnn", target), device)
            alone.take()
            torch.save(alone.gradients, f"{folder}/{variant}")
        case = {"device": device.type, "folder": folder, "variants": variants, "threads": 1, "budget": SECONDS}
        (answer,) = run_case("tests.gpu.exact", world, case)
    if "skipped" in answer:
        raise CheckError(f"{world} ranks: {answer['skipped']}")
    said = [within(f"gradient of {variant}", error, LIMIT) for variant, error in answer.items()]
    return f"{'NCCL' if device.type == 'cuda' else 'gloo'}, {world} ranks: {'; '.join(said)}"


def run_rank(rank: Runtime, case: dict[str, Any]) -> dict[str, float]:
    """The largest error of all ranks, by variant. Collective."""
    with convolutions_in_float32():
        found = collectives.gather_json(errors(rank, case["variants"], case["folder"]))
    return {variant: max(one[variant] for one in found) for variant in case["variants"]}


def errors(rank: Runtime, variants: dict[str, str], folder: str) -> dict[str, float]:
    """Of this rank's gradient beside the file's, for each variant."""
    found = {}
    for variant, target in variants.items():
        rig = Rig(settings("small_cnn", target), rank.device, rank)
        rig.take()
        wanted = torch.load(f"{folder}/{variant}", map_location="cpu", weights_only=True)
        found[variant] = distance(rig.gradients, wanted)
    return found


CHECKS = {
    "layout": layout_and_chunks_change_nothing,
    "exact": step_is_exact,
    "ranks": ranks_are_one_batch,
    "compiled": compiled_step_is_the_same,
}
