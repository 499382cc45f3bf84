"""Losses and gradients of one step, in several ways, beside float64 on the CPU."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.common import run_case
from dist_obdsd.distributed import collectives
from dist_obdsd.distributed.launch import Launch, Runtime
from dist_obdsd.training import strategy
from tests import harness
from tests.gpu.rig import CPU, Rig, distance, settings, within

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
SUMMED = 1e-4
"""Of a gradient's relative error: two float32 sums of the same numbers in another order."""
TARGETS = ("none", "psd", "obdsd", "obdsd_symmetric")
SAME = ("model.channels_last=false", "batch.chunk=8", "model.compile=true")
"""Settings that change no number."""


@pytest.mark.parametrize("backbone", ["small_cnn", "resnet18"])
@pytest.mark.parametrize("way", [*(f"distillation.target={target}" for target in TARGETS), *SAME])
def test_a_step_is_exact(device, backbone, way, monkeypatch):
    """Losses and gradients of one step beside those of the same step in float64 on the CPU."""
    if device.type == "cpu" and (backbone == "resnet18" or way == "model.compile=true"):
        pytest.skip("takes half a minute on a CPU")
    target = way if way not in SAME else "distillation.target=obdsd"
    precisions = ("float32",) if way in SAME else ("float32", "bf16", *(["tf32"] if device.type == "cuda" else []))
    wanted, wanted_gradients = one_step(CPU, backbone, target, "precision=float64")
    for precision in precisions:
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", precision != "float32")
        wide = "bf16" if precision == "bf16" else "float32"
        numbers, gradients = one_step(device, backbone, way, f"precision={wide}")
        losses, slopes = LIMITS[backbone, precision]
        for name in {"ranking", "distillation"} & wanted.keys():
            within(f"{precision}: error of {name}", abs(numbers[name] / wanted[name] - 1), losses)
        within(f"{precision}: error of the gradient", distance(gradients, wanted_gradients), slopes)


def one_step(device: torch.device, backbone: str, *overrides: str) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    rig = Rig(settings(backbone, *overrides), device)
    numbers = rig.numbers()
    assert not numbers["masked"]
    return numbers, rig.gradients


def test_a_gradient_that_is_not_exact_is_found(monkeypatch):
    clipped = strategy.Strategy._clipped_norm

    def longer(self: strategy.Strategy, own: list[torch.nn.Parameter]) -> torch.Tensor:
        for _, p in self.parameters:
            if p.dtype == torch.float32:  # not the reference
                p.grad *= 1.001
        return clipped(self, own)

    monkeypatch.setattr(strategy.Strategy, "_clipped_norm", longer)
    with pytest.raises(AssertionError, match="error of the gradient"):
        test_a_step_is_exact(CPU, "small_cnn", "distillation.target=obdsd", monkeypatch)


def error(rank: Runtime, *overrides: str, alone: tuple[str, ...] = ()) -> float:
    """Of the ranks' gradient beside that of this process alone with the whole batch. Collective.

    Args:
        alone: further settings of the process alone.
    """
    groups = [dist.new_group([number]) for number in range(rank.world_size)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        with collectives.within(groups[rank.rank]):
            one = Rig(settings("small_cnn", *overrides, *alone), rank.device)
            one.objective.group = groups[rank.rank]
            one.take()
        rig = Rig(settings("small_cnn", *overrides), rank.device, rank)
        rig.take()
    return distance(rig.gradients, one.gradients)


def error_of_cpu_rank(*alone: str) -> float:
    rank, world = dist.get_rank(), dist.get_world_size()
    return error(Runtime(Launch("test", rank, world, rank, world), CPU), alone=alone)


def test_ranks_are_one_batch_and_are_told_from_another():
    assert max(harness.run(2, error_of_cpu_rank)) < SUMMED
    assert min(harness.run(2, error_of_cpu_rank, "distillation.weight=30")) > 100 * SUMMED


def errors_of_all(rank: Runtime, case: dict[str, Any]) -> dict[str, float]:
    """The largest error of all ranks, by target. Collective."""
    targets = ("none", "obdsd")
    found = collectives.gather_json({target: error(rank, f"distillation.target={target}") for target in targets})
    return {target: max(one[target] for one in found) for target in targets}


@pytest.mark.gpu
def test_all_gpus_are_one_batch(gpu):
    world = max(W for W in (1, 2, 4, 8, 16) if torch.cuda.device_count() >= W)  # such as divide the batch
    if world == 1:
        pytest.skip("there is one GPU")
    (answer,) = run_case(errors_of_all, world, {"device": "cuda", "threads": 1})
    for target, found in answer.items():
        within(f"{world} ranks: gradient of {target}", found, SUMMED)
