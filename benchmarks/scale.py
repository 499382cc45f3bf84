"""The messages, bytes and memory of a training step on many GPUs, counted on rank 0 without them.

Torch's fake process group answers every collective, and fake tensors have sizes but no numbers, so the step's own code
runs and nothing is computed. Where the host looks at an error it finds 0, so solvers stop at their first check. The
gradients' all-reduce is counted from the parameters, in DDP's buckets of 25 MiB.

    MiB sent     what rank 0 puts on the network in a step: rings, so (W - 1) / W of a gather or reduce-scatter, twice
                 that of an all-reduce
    peak GiB     the largest sum of live tensors on rank 0: weights, optimizer, activations, objective
"""

import argparse
import math
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
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
from dist_obdsd.distributed import collectives
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
def without_numbers(world: int) -> Iterator[None]:
    """Let what looks into numbers go without: sizes are compared as text in the first step, labels are looked up."""
    sizes = patch.object(collectives, "gather_json", lambda value: [value] * world)
    labels = patch.object(train_step, "class_indices", lambda labels, classes: labels)
    with sizes, labels:
        yield


def measure(backbone: str, world: int, options: argparse.Namespace) -> Row:
    """One row: a step of rank 0 of ``world``."""
    b, B = options.batch, options.batch * world
    raw = {
        "name": "scale",
        "epochs": 2,
        "data": {"shards": "made up", "image_size": 224, "lanes": world},
        "batch": {"global_size": B, "samples_per_class": 2},
        "model": {"backbone": backbone, "embedding_dim": options.dim},
        "distillation": {"memory_gib": options.memory_gib},
    }
    config = parse_config(raw, "benchmarks.scale")
    runtime = Runtime(Launch("single"), torch.device("cpu"))  # of one, or DDP would look into the fake tensors
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        fake, meter = FakeMode(), Meter(world)
        student = fake_embedder(config, fake)
        with without_numbers(world), fake, meter:
            for tensor in (*student.parameters(), *student.buffers()):
                meter.hold(tensor)
            step = TrainStep(
                config, runtime, build_strategy(student, config, runtime, []), ProgressiveTeacher(student),
                build_objective(config, range(B // 2), runtime.device), range(B // 2),
            )  # fmt: skip
            shape = (b, config.data.channels, *config.data.size)
            for _ in range(2):  # the optimizer has its state from the first one on
                meter.messages.clear()
                meter.sent.clear()
                images = torch.zeros(shape, dtype=torch.uint8)
                batch = TrainBatch(1, 0, images, torch.arange(b), torch.arange(B) // 2, [])
                step(batch, TrainProgress(1, 0, 1), 0.0)
            gradient = sum(p.nbytes for p in student.parameters())
            meter.count("allreduce of gradients", gradient, math.ceil(gradient / BUCKET))
    finally:
        dist.destroy_process_group()
    embeddings = sum(n for name, n in meter.sent.items() if "gradients" not in name)
    return {
        "backbone": backbone.removeprefix("timm/"),
        "W": world,
        "B": B,
        "messages": sum(meter.messages.values()),
        "of gradients": meter.messages["allreduce of gradients"],
        "MiB sent": sum(meter.sent.values()) / 2**20,
        "of embeddings": embeddings / 2**20,
        "peak GiB": meter.peak / 2**30,
    }


def run(options: argparse.Namespace) -> list[Row]:
    return [measure(backbone, world, options) for backbone in options.backbones for world in options.worlds]


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--worlds", type=common.numbers, default=[16, 64, 512], metavar="W,W", help="ranks (16,64,512)")
    parser.add_argument("--batch", type=int, default=112, help="images of a rank (default: 112)")
    parser.add_argument("--backbones", nargs="*", default=list(BACKBONES))
    parser.add_argument("--memory-gib", type=float, default=40.0, help="that the diffusion may take (default: 40)")
    return common.main(parser.parse_args(), run, lambda rows: {})


if __name__ == "__main__":
    sys.exit(main())
