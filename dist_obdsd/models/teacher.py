"""Progressive teacher: the student after the previous epoch (arXiv 2211.07566)."""

import copy
import hashlib
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from dist_obdsd.distributed import collectives, shards
from dist_obdsd.distributed.collectives import Group
from dist_obdsd.errors import InputError, RunError


class ProgressiveTeacher(nn.Module):
    """A frozen copy of the student, parameters and buffers, always in eval mode.

    >>> teacher = ProgressiveTeacher(student)
    >>> T_bD = teacher(images)  # without gradient
    >>> teacher.update(student)  # at the end of an epoch; takes DDP-wrapped and compiled students, too

    As a submodule it moves and is saved with its parent, stays in eval mode, and is changed by no optimizer. Before the
    first update it is the initial student; the published ramp epoch / epochs leaves it out until then.
    """

    updates: torch.Tensor

    def __init__(self, student: nn.Module, *, group: Group = None) -> None:
        """
        Args:
            student: the network, plain or wrapped.
            group: the process group whose ranks hold the same teacher; None is the default one.

        Raises:
            InputError: the student cannot be copied, as one that FSDP has sharded already.
        """
        super().__init__()
        try:
            self.network = copy.deepcopy(unwrapped(student)).requires_grad_(False).eval()
        except (AssertionError, RuntimeError, TypeError) as error:
            raise InputError(
                f"the student cannot be copied ({str(error).splitlines()[0] if str(error) else type(error).__name__}); "
                f"make the teacher before the student is sharded, and shard both alike"
            ) from error
        self.group = group
        # How often it was updated; the device is never asked for it in a step.
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @property
    def epoch(self) -> int:
        """Epochs that the weights were trained for: 0 is the initial student."""
        return int(self.updates)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Stay frozen."""
        return super().requires_grad_(False)

    @torch.no_grad()
    def forward(self, *inputs: Any, **more: Any) -> torch.Tensor:
        """Embed what the student takes as unit rows [b, D], without gradient."""
        rows_bD: torch.Tensor = self.network(*inputs, **more)
        return rows_bD

    @torch.no_grad()
    def update(self, student: nn.Module, *, verify: bool = True) -> None:
        """Take over the student's weights and buffers. Collective where it verifies.

        Args:
            student: the network that this is a copy of, plain or wrapped.
            verify: compare the bytes across the ranks.

        Raises:
            InputError: the student has other tensors than the teacher.
            RunError: on every rank, with the names of the tensors that differ between ranks.
        """
        theirs, ours = unwrapped(student).state_dict(), self.network.state_dict()
        shapes = [{(name, tensor.shape) for name, tensor in state.items()} for state in (theirs, ours)]
        if differing := sorted({name for name, _ in shapes[0] ^ shapes[1]}):
            raise InputError(
                f"the student is another network than the teacher was made of; these tensors differ: "
                f"{', '.join(differing[:5])}; update with the same network"
            )
        for name, tensor in ours.items():
            tensor.copy_(theirs[name])
        self.network.train().eval()  # layers that keep what they made of their weights, such as LeViT's, forget it
        self.updates += 1
        if verify:
            check_identical("the teacher", self.network, self.group)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the network inside DDP, DataParallel, torch.compile or DeepSpeed."""
    while True:
        wrapped = isinstance(module, DistributedDataParallel | DataParallel)
        name = "module" if wrapped or type(module).__name__ == "DeepSpeedEngine" else "_orig_mod"
        inner = getattr(module, name, None)
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def fingerprints(network: nn.Module) -> dict[str, str]:
    """Digest each tensor's bytes, of a sharded one this rank's numbered part."""
    prints = {}
    for name, tensor in network.state_dict().items():
        number, x = shards.shard_number(tensor), shards.local(tensor.detach())
        data = x.cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
        prints[f"{name}, shard {number}" if number else name] = hashlib.sha256(data).hexdigest()[:16]
    return prints


def check_identical(what: str, network: nn.Module, group: Group = None) -> None:
    """Compare a network's bytes across ranks, or raise RunError on each. Collective."""
    with collectives.within(group):
        all_prints = collectives.gather_json(fingerprints(network))
    first: dict[str, str] = {}
    items = (item for prints in all_prints for item in prints.items())
    differing = sorted({name for name, digest in items if first.setdefault(name, digest) != digest})
    if differing:
        shown = ", ".join(differing[:5]) + (", ..." if len(differing) > 5 else "")
        raise RunError(
            f"{what} differs between ranks in {len(differing)} tensors ({shown}); "
            f"check that all nodes run the same versions, and resume from the last checkpoint"
        )


def load_teacher_state(teacher: ProgressiveTeacher, state: Mapping[str, Any]) -> None:
    """Restore a checkpoint's ``network`` and ``epoch``. Collective."""
    teacher.network.load_state_dict(shards.shard_state(state["network"], teacher.network))
    teacher.updates.fill_(state["epoch"])
    check_identical("the teacher", teacher.network)
