"""The memory of a rank in training, by what it is for, measured without a GPU.

One rank of torch's fake process group takes two real steps on fake tensors, which have sizes but no numbers. Its live
storages are counted all the while.

    kept          weights, gradients, the optimizer's state and the teacher, between two steps
                  (gradients as the weights; FSDP drops them after a step)
    activations   what the largest moment of the second step holds beyond those: activations, rows of the objective, and
                  blocks that FSDP has gathered
"""

import argparse
import gc
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks import common
from benchmarks.common import Row
from benchmarks.scale import FakeMode, Meter, without_numbers
from dist_obdsd.config import parse_config
from dist_obdsd.data.stream import TrainBatch
from dist_obdsd.distributed import shards
from dist_obdsd.distributed.launch import Launch, Runtime
from dist_obdsd.losses.build import build_objective
from dist_obdsd.models.teacher import ProgressiveTeacher
from dist_obdsd.training.memory import fake_embedder
from dist_obdsd.training.strategy import build_strategy
from dist_obdsd.training.train_step import TrainProgress, TrainStep

BACKBONES = ("timm/vit_large_patch14_dinov2", "timm/vit_giant_patch14_dinov2")


def measure(backbone: str, strategy: str, world: int, recompute: bool, options: argparse.Namespace) -> Row:
    """Measure rank 0 of ``world``."""
    b, B = options.batch, options.batch * world
    raw = {
        "name": "memory",
        "epochs": 2,
        "strategy": strategy,
        "precision": options.precision,
        "data": {"shards": "made up", "image_size": 224, "lanes": world},
        "batch": {"global_size": B, "samples_per_class": 2},
        "model": {"backbone": backbone, "embedding_dim": 512, "checkpoint_blocks": recompute},
        "distillation": {"memory_gib": 40.0},
        "optim": {"name": "adamw"},
    }
    config = parse_config(raw, "benchmarks.memory")
    # DDP itself would look into the fake tensors; its gradients are views of its buckets, so they take no more.
    W = 1 if strategy == "ddp" else world
    runtime = Runtime(Launch("fake", 0, W, 0, W), torch.device("cpu"))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        mode = FakeMode()
        student = fake_embedder(config, mode)
        mesh = shards.device_mesh("cpu")  # which looks for this rank's number in it
        with ExitStack() as stack:
            stack.enter_context(patch.object(shards, "device_mesh", lambda *_: mesh))
            stack.enter_context(without_numbers(world))
            stack.enter_context(mode)
            meter = stack.enter_context(Meter(world))
            for tensor in (*student.parameters(), *student.buffers()):
                meter.hold(tensor)
            teacher = ProgressiveTeacher(student)
            built = build_strategy(student, config, runtime, [])
            built.shard(teacher.network, teacher=True)
            step = TrainStep(
                config, runtime, built, teacher, build_objective(config, range(B // 2), runtime.device), range(B // 2)
            )
            for _ in range(2):  # the optimizer has its state from the first one on
                gc.collect()
                meter.peak = meter.live
                images = torch.zeros(b, config.data.channels, *config.data.size, dtype=torch.uint8)
                batch = TrainBatch(1, 0, images, torch.arange(b), torch.arange(B) // 2, [])
                step(batch, TrainProgress(1, 0, 1), 0.0)
            weights = gib(student.parameters())
            parts = {
                "weights": weights,
                "gradients": weights,
                "optimizer": gib(x for state in built.optimizer.state.values() for x in state.values()),
                "teacher": gib(teacher.network.parameters()),
            }
            peak = meter.peak / 2**30
    finally:
        dist.destroy_process_group()
    who = {"network": backbone.removeprefix("timm/"), "strategy": strategy, "W": world, "recompute": recompute}
    return who | parts | {"activations": peak - sum(parts.values()), "peak": peak}


def gib(tensors: Iterable[Any]) -> float:
    """Sum up this rank's shards, in GiB."""
    return sum(shards.local(x).untyped_storage().nbytes() for x in tensors) / 2**30


def run(options: argparse.Namespace) -> list[Row]:
    return [
        measure(backbone, strategy, world, recompute, options)
        for backbone in options.backbones
        for strategy, worlds in (("ddp", options.worlds[:1]), ("fsdp", options.worlds))
        for world in worlds
        for recompute in (False, True)
    ]


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--worlds", type=common.numbers, default=[8, 64], metavar="W,W", help="ranks (8,64)")
    parser.add_argument("--batch", type=int, default=32, help="images of a rank (default: 32)")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="bf16")
    parser.add_argument("--backbones", nargs="*", default=list(BACKBONES))
    return common.main(parser.parse_args(), run, lambda rows: {})


if __name__ == "__main__":
    sys.exit(main())
