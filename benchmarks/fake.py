"""One rank of many without the others: fake tensors in a fake process group, and a meter of what it does."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_obdsd.distributed import collectives, shards
from dist_obdsd.training import train_step

FREE = {"_unsafe_view", "empty", "empty_like", "empty_strided", "lift_fresh", "new_empty", "new_empty_strided"}
"""Operations that start no kernel."""


class FakeMode(FakeTensorMode):
    """One mode, also for the teacher's copies of the student's tensors."""

    def __deepcopy__(self, memo: Any) -> "FakeMode":
        return self


@contextmanager
def ranks(world: int, device: str = "cpu") -> Iterator[None]:
    """Be rank 0 of a fake process group, and let what looks into numbers go without."""
    backend = ",".join(f"{one}:fake" for one in {"cpu", device})
    dist.init_process_group(backend, store=FakeStore(), rank=0, world_size=world)
    real_mesh = shards.device_mesh

    def device_mesh(*args: Any) -> Any:
        with unset_fake_temporarily():  # it looks for this rank's number in it
            return real_mesh(*args)

    try:
        with (
            patch.object(shards, "device_mesh", device_mesh),
            # Sizes are compared as text in the first step, labels are looked up.
            patch.object(collectives, "gather_json", lambda value: [value] * world),
            patch.object(train_step, "class_indices", lambda labels_B, classes_C: labels_B),
        ):
            yield
    finally:
        dist.destroy_process_group()


class Meter(TorchDispatchMode):
    """Counts launches, the bytes that they read and write, messages, bytes that are sent, and bytes that are held."""

    def __init__(self, world: int, device: str = "cpu") -> None:
        super().__init__()
        self.world, self.device = world, device
        self.launches = self.moved = self.messages = self.sent = self.held = self.peak = 0
        self._sizes = weakref.WeakKeyDictionary[Any, list[int]]()

    def __enter__(self) -> Any:
        # FSDP gives a gathered block's memory back by its storage, which no operation shows.
        self._resize = patch.object(torch.UntypedStorage, "resize_", self._resizing(torch.UntypedStorage.resize_))
        self._resize.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._resize.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given, made = (
            [x for x in tree_leaves(of) if isinstance(x, torch.Tensor) and x.device.type == self.device]
            for of in ((args, kwargs), result)
        )
        name = func._schema.name.rpartition("::")[2]
        if func.namespace == "c10d":
            self.send(name, max((x.nbytes for x in given), default=0))
        if func.is_view:
            return result
        if made and name not in FREE:
            self.launches += 1
            self.moved += sum(x.nbytes for x in (*given, *made))
        for x in made:
            self.hold(x)
        return result

    def send(self, message: str, nbytes: int, messages: int = 1) -> None:
        """Count what rank 0 sends: in rings (W - 1) / W of a gather or scatter, and twice that of an all-reduce."""
        self.messages += messages
        self.sent += int(nbytes * (self.world - 1) / self.world * (1 + ("allreduce" in message)))

    def hold(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage as long as it lives; of a DTensor, this rank's shard."""
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
        if storage not in self._sizes:
            size = self._sizes[storage] = [0]
            self._resized(size, storage.nbytes())
            weakref.finalize(storage, self._resized, size, 0)

    def begin(self) -> None:
        """Count from here on, beside what is held."""
        gc.collect()
        self.messages = self.sent = 0
        self.peak = self.held

    def _resized(self, size: list[int], nbytes: int) -> None:
        self.held += nbytes - size[0]
        self.peak, size[0] = max(self.peak, self.held), nbytes

    def _resizing(self, original: Any) -> Any:
        def resize(storage: torch.UntypedStorage, nbytes: int) -> None:
            original(storage, nbytes)
            if storage in self._sizes:
                self._resized(self._sizes[storage], nbytes)

        return resize
