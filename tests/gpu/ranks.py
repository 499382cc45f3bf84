"""Process groups on the device: a step of W ranks is that of one process with the whole batch."""

import tempfile
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.common import run_case
from dist_obdsd.distributed import collectives
from dist_obdsd.distributed.launch import Runtime
from tests.gpu.rig import CheckError, Rig, Skipped, convolutions_in_float32, distance, settings, within

LIMIT = 1e-4
"""Of the gradient's relative error: two float32 sums of the same numbers in another order."""
SECONDS = 60.0


def group_of_one(device: torch.device, quick: bool) -> str:
    """The device's own backend with one rank: gather with gradient, reduce-scatter, all-reduce, DDP's buckets."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    alone = Rig(settings("small_cnn"), device)
    alone.take()
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        rows = torch.randn(8, 4, device=device, requires_grad=True)
        weights = torch.randn(8, 4, device=device)
        # ``gather_rows`` itself returns the rows of a world of one as they are.
        (collectives._GatherRows.apply(rows) * weights).sum().backward()
        total = weights.clone()
        dist.all_reduce(total)
        if rows.grad is None or not torch.equal(rows.grad, weights) or not torch.equal(total, weights):
            raise CheckError("a gather, reduce-scatter or all-reduce with one rank changed its numbers")
        rig = Rig(settings("small_cnn"), device)
        rig.strategy.network = DistributedDataParallel(
            rig.student, device_ids=[device.index or 0] if device.type == "cuda" else None, gradient_as_bucket_view=True
        )
        rig.take()
        said = within("gradient through DDP", distance(rig.gradients, alone.gradients), LIMIT)
    finally:
        dist.destroy_process_group()
    return f"{backend}: {said}"


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
        answer = run_case("tests.gpu.ranks", world, case)
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
        found[variant] = distance(
            rig.gradients, torch.load(f"{folder}/{variant}", map_location="cpu", weights_only=True)
        )
    return found
