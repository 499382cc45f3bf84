"""The messages, bytes and memory of a rank's training step on many GPUs, counted on rank 0 without them.

Torch's fake process group answers every collective, and fake tensors have sizes but no numbers, so the step's own code
runs and nothing is computed. Where the host looks at an error it finds 0, so solvers stop at their first check. DDP's
all-reduce of the gradients is counted from the parameters, in its buckets of 25 MiB.

    MiB sent       what rank 0 puts on the network in a step: rings, so (W - 1) / W of a gather or reduce-scatter, twice
                   that of an all-reduce
    GiB weights, gradients, optimizer, teacher     of this rank, between two steps (gradients as the weights; FSDP drops
                   them after a step)
    activations    what the largest moment of the second step holds beyond those: activations, rows of the objective,
                   and blocks that FSDP has gathered
"""

import argparse
import gc
import math
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import common
from benchmarks.common import Row
from dist_obdsd.config import parse_config
from dist_obdsd.data.stream import TrainBatch
from dist_obdsd.distributed import collectives, shards
from dist_obdsd.distributed.launch import Launch, Runtime
from dist_obdsd.losses.build import build_objective
from dist_obdsd.models.teacher import ProgressiveTeacher
from dist_obdsd.training import train_step
from dist_obdsd.training.memory import fake_embedder
from dist_obdsd.training.strategy import build_strategy
from dist_obdsd.training.train_step import TrainProgress, TrainStep

BACKBONES = ("resnet50", "timm/vit_large_patch16_224")
BUCKET = 25 * 2**20


class FakeMode(FakeTensorMode):
    """One mode, also for the teacher's copies of the student's tensors."""

    def __deepcopy__(self, memo: Any) -> "FakeMode":
        return self


class Meter(TorchDispatchMode):
    """Counts collectives and live bytes of what runs under it, and answers the host's questions."""

    def __init__(self, world: int) -> None:
        super().__init__()
        self.world, self.messages, self.sent = world, Counter[str](), Counter[str]()
        self.live = self.peak = 0
        self._all: torch.Tensor | None = None  # the latest answer to "do all ...?", which is yes
        self._storages = weakref.WeakKeyDictionary[Any, list[int]]()

    def __enter__(self) -> Any:
        # FSDP gives a gathered block's memory back by its storage, which no operation shows.
        self._resize = patch.object(torch.UntypedStorage, "resize_", self._resizing(torch.UntypedStorage.resize_))
        self._resize.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._resize.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0.0 if args[0].dtype.is_floating_point else args[0] is self._all
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.all:
            self._all = out
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            largest = max(t.nbytes for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
            self.count(name, largest)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.hold(tensor)
        return out

    def count(self, name: str, nbytes: int, messages: int = 1) -> None:
        self.messages[name] += messages
        self.sent[name] += int(nbytes * (self.world - 1) / self.world * (1 + ("allreduce" in name)))

    def hold(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage as long as it lives; of a DTensor, this rank's shard."""
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
        if storage not in self._storages and tensor.device.type != "meta":
            size = self._storages[storage] = [0]
            self._resized(size, storage.nbytes())
            weakref.finalize(storage, self._resized, size, 0)

    def begin(self) -> None:
        """Count from here on, beside what is alive."""
        gc.collect()
        self.messages.clear()
        self.sent.clear()
        self.peak = self.live

    def _resized(self, size: list[int], nbytes: int) -> None:
        self.live += nbytes - size[0]
        self.peak, size[0] = max(self.peak, self.live), nbytes

    def _resizing(self, original: Any) -> Any:
        def resize(storage: torch.UntypedStorage, nbytes: int) -> None:
            original(storage, nbytes)
            if storage in self._storages:
                self._resized(self._storages[storage], nbytes)

        return resize


@contextmanager
def fake_ranks(world: int) -> Iterator[None]:
    """Be rank 0 of a fake process group, and let what looks into numbers go without."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    mesh = shards.device_mesh("cpu")  # which looks for this rank's number in it
    try:
        with (
            patch.object(shards, "device_mesh", lambda *_: mesh),
            # Sizes are compared as text in the first step, labels are looked up.
            patch.object(collectives, "gather_json", lambda value: [value] * world),
            patch.object(train_step, "class_indices", lambda labels, classes: labels),
        ):
            yield
    finally:
        dist.destroy_process_group()


def measure(backbone: str, world: int, options: argparse.Namespace) -> Row:
    """One row: a step of rank 0 of ``world``."""
    b, B = options.batch, options.batch * world
    raw = {
        "name": "scale",
        "epochs": 2,
        "strategy": options.strategy,
        "precision": options.precision,
        "data": {"shards": "made up", "image_size": 224, "lanes": world},
        "batch": {"global_size": B, "samples_per_class": 2},
        "model": {"backbone": backbone, "embedding_dim": options.dim, "checkpoint_blocks": options.recompute},
        "distillation": {"memory_gib": options.memory_gib},
        "optim": {"name": "adamw"},
    }
    config = parse_config(raw, "benchmarks.scale")
    # DDP itself would look into the fake tensors; its gradients are views of its buckets, so they take no more.
    W = 1 if options.strategy == "ddp" else world
    runtime = Runtime(Launch("fake", 0, W, 0, W), torch.device("cpu"))
    with ExitStack() as stack:
        stack.enter_context(fake_ranks(world))
        mode = FakeMode()
        student = fake_embedder(config, mode)
        stack.enter_context(mode)
        meter = stack.enter_context(Meter(world))
        for tensor in (*student.parameters(), *student.buffers()):
            meter.hold(tensor)
        teacher = ProgressiveTeacher(student)
        strategy = build_strategy(student, config, runtime, [])
        strategy.shard(teacher.network, teacher=True)
        objective = build_objective(config, range(B // 2), runtime.device)
        step = TrainStep(config, runtime, strategy, teacher, objective, range(B // 2))
        for _ in range(2):  # the optimizer has its state from the first one on
            meter.begin()
            images = torch.zeros(b, config.data.channels, *config.data.size, dtype=torch.uint8)
            batch = TrainBatch(1, 0, images, torch.arange(b), torch.arange(B) // 2)
            step(batch, TrainProgress(1, 0, 1), 0.0)
        embeddings = sum(meter.sent.values())
        row: Row = {"network": backbone.removeprefix("timm/"), "strategy": options.strategy, "W": world, "B": B}
        if options.strategy == "ddp":
            gradient = sum(p.nbytes for p in student.parameters())
            meter.count("allreduce of gradients", gradient, math.ceil(gradient / BUCKET))
            row |= {"of gradients": meter.messages["allreduce of gradients"], "of embeddings": embeddings / 2**20}
        row |= {"messages": sum(meter.messages.values()), "MiB sent": sum(meter.sent.values()) / 2**20}
        weights = gib(student.parameters())
        parts = {
            "weights": weights,
            "gradients": weights,
            "optimizer": gib(x for state in strategy.optimizer.state.values() for x in state.values()),
            "teacher": gib(teacher.network.parameters()),
        }
        peak = meter.peak / 2**30
        return row | parts | {"activations": peak - sum(parts.values()), "peak GiB": peak}


def gib(tensors: Iterable[Any]) -> float:
    """Sum up this rank's shards, in GiB."""
    return sum(shards.local(x).untyped_storage().nbytes() for x in tensors) / 2**30


def run(options: argparse.Namespace) -> list[Row]:
    return [measure(backbone, W, options) for backbone in options.backbones for W in options.worlds]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = common.parser(__doc__, worlds=(16, 64, 512))
    parser.add_argument("--batch", type=int, default=112, help="images of a rank (default: 112)")
    parser.add_argument("--backbones", nargs="*", default=list(BACKBONES))
    parser.add_argument("--strategy", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--recompute", action="store_true", help="with model.checkpoint_blocks")
    parser.add_argument("--memory-gib", type=float, default=40.0, help="that the diffusion may take (default: 40)")
    return common.main(parser.parse_args(arguments), run)


if __name__ == "__main__":
    sys.exit(main())
