"""The messages, bytes and memory of a rank's training step on many GPUs, counted on rank 0 without them.

Torch's fake process group answers every collective, and fake tensors have sizes but no numbers, so the step's own code
runs and nothing is computed. Where the host looks at an error it finds 0, so solvers stop at their first check. DDP's
all-reduce of the gradients is counted from the parameters, in its buckets of 25 MiB.

    MiB sent       what rank 0 puts on the network in a step
    GiB weights, gradients, optimizer, teacher     of this rank, between two steps (gradients as the weights; FSDP drops
                   them after a step)
    activations    what the largest moment of the second step holds beyond those: activations, rows of the objective,
                   and blocks that FSDP has gathered
"""

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import common, fake, step
from benchmarks.common import Row
from dist_obdsd.data.stream import TrainBatch
from dist_obdsd.distributed import shards
from dist_obdsd.distributed.launch import Launch, Runtime
from dist_obdsd.training.memory import fake_embedder
from dist_obdsd.training.train_step import TrainProgress

BUCKET = 25 * 2**20


class Answers(TorchDispatchMode):
    """What the host is told where it asks for a number: 0, and that all are as they should be."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0.0 if args[0].dtype.is_floating_point else args[0] is self._all
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.all:
            self._all = result
        return result


def measure(world: int, options: argparse.Namespace) -> Row:
    """One row: a step of rank 0 of ``world``."""
    b, B = options.batch, options.batch * world
    config = step.build_config(
        B, f"data.lanes={world}", "model.backbone=resnet50", "distillation.memory_gib=40", "optim.name=adamw",
        *options.settings,
    )  # fmt: skip
    # DDP itself would look into the fake tensors; its gradients are views of its buckets, so they take no more.
    W = 1 if config.strategy == "ddp" else world
    runtime = Runtime(Launch("fake", 0, W, 0, W), torch.device("cpu"))
    with ExitStack() as stack:
        stack.enter_context(fake.ranks(world))
        mode = fake.FakeMode()
        student = fake_embedder(config, mode)
        stack.enter_context(mode)
        meter = stack.enter_context(fake.Meter(world))
        stack.enter_context(Answers())
        for tensor in (*student.parameters(), *student.buffers()):
            meter.hold(tensor)
        take = step.build_step(config, runtime, student)
        for _ in range(2):  # the optimizer has its state from the first one on
            meter.begin()
            images_b = torch.zeros(b, config.data.channels, *config.data.size, dtype=torch.uint8)
            batch = TrainBatch(1, 0, images_b, torch.arange(b), torch.arange(B) // 2)
            take(batch, TrainProgress(1, 0, 1), 0.0)
        embeddings = meter.sent
        row: Row = {"network": config.model.backbone.removeprefix("timm/"), "strategy": config.strategy}
        row |= {"W": world, "B": B}
        if config.strategy == "ddp":
            gradient = sum(p.nbytes for p in student.parameters())
            buckets = math.ceil(gradient / BUCKET)
            meter.send("allreduce", gradient, buckets)
            row |= {"of gradients": buckets, "of embeddings": embeddings / 2**20}
        row |= {"messages": meter.messages, "MiB sent": meter.sent / 2**20}
        weights, peak = gib(student.parameters()), meter.peak / 2**30
        parts = {
            "weights": weights,
            "gradients": weights,
            "optimizer": gib(x for state in take.strategy.optimizer.state.values() for x in state.values()),
            "teacher": gib(take.teacher.network.parameters()) if take.teacher else 0.0,
        }
        return row | parts | {"activations": peak - sum(parts.values()), "peak GiB": peak}


def gib(tensors: Iterable[Any]) -> float:
    """Sum up this rank's shards, in GiB."""
    return sum(shards.local(x).untyped_storage().nbytes() for x in tensors) / 2**30


def run(options: argparse.Namespace) -> list[Row]:
    return [measure(W, options) for W in options.worlds]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = common.parser(__doc__, worlds=[16, 64, 512], batch=112)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings, such as strategy=fsdp")
    return common.main(parser, arguments, run)


if __name__ == "__main__":
    sys.exit(main())
