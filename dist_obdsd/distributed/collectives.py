"""All messages between ranks; only ``shards`` also calls torch's collectives.

They concern the ranks of the default process group, or of the one that ``within`` names. Without a process group, each
function works as in a world of one. Shapes: b rows here, B = W * b rows on all ranks.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist

from dist_obdsd.errors import InputError, RunError, UserError

Group = dist.ProcessGroup | None
"""A process group; None is the default one."""

_GROUP: ContextVar[Group] = ContextVar("group", default=None)


@contextmanager
def within(group: Group) -> Iterator[None]:
    """Let the functions of this module concern the ranks of ``group`` alone.

    Raises:
        InputError: this process is not in the group.
    """
    token = _GROUP.set(group)
    try:
        if rank() < 0:
            raise InputError("this process is not among the ranks of the given group; call on its ranks only")
        yield
    finally:
        _GROUP.reset(token)


def world_size() -> int:
    return dist.get_world_size(_GROUP.get()) if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank(_GROUP.get()) if dist.is_initialized() else 0


def sends_from(device: torch.device) -> torch.device:
    """Return the device that tensors travel from: ``nccl`` and ``gloo`` have one."""
    if world_size() == 1:
        return device
    return {"nccl": torch.device("cuda"), "gloo": torch.device("cpu")}.get(dist.get_backend(_GROUP.get()), device)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_b: torch.Tensor) -> torch.Tensor:
        ctx.group, ctx.world_size = _GROUP.get(), world_size()  # a backward runs in a thread of its own
        x_b = x_b.contiguous()
        x_B = x_b.new_empty(ctx.world_size * x_b.shape[0], *x_b.shape[1:])
        dist.all_gather_into_tensor(x_B, x_b, group=ctx.group)
        return x_B

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        # Every rank's loss depends on these rows, so their gradient is the sum over the ranks.
        grad_B = grads[0].contiguous()
        grad_b = grad_B.new_empty(grad_B.shape[0] // ctx.world_size, *grad_B.shape[1:])
        dist.reduce_scatter_tensor(grad_b, grad_B, op=dist.ReduceOp.SUM, group=ctx.group)
        return grad_b


def mean_gradient(x: torch.Tensor) -> torch.Tensor:
    """Return ``x``, whose gradient is averaged over the ranks, a collective backward."""
    if world_size() > 1:
        x = x.view_as(x)
        average_gradient(x)
    return x


def average_gradient(x: torch.Tensor) -> None:
    """Average over the ranks each gradient that reaches ``x``."""
    group, W = _GROUP.get(), world_size()  # a backward runs in a thread of its own

    def mean(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=group)
        return gradient.div_(W)

    if x.requires_grad:
        x.register_hook(mean)


def all_gather_rows(x_b: torch.Tensor, *, group: Group = None) -> torch.Tensor:
    """Gather the rows of all ranks with the exact gradient.

    >>> rows = all_gather_rows(embeddings)  # [b, D] on each of W ranks -> [W * b, D]

    The backward sums over the ranks what their losses ask of these rows (reduce-scatter) and returns the own rows'. If
    each rank's loss is a share of the global loss times W, DDP's mean then makes the gradient of one process that holds
    the whole batch. torch's ``all_gather`` has no gradient at all.

    Args:
        x_b: [b, ...], the same shape on every rank.
        group: the process group whose ranks take part; None is the default one. Without one, ``x_b`` is returned.

    Returns:
        [B, ...] with rank r's rows at r*b to (r+1)*b.

    Raises:
        RunError: on every rank, when the shapes or types differ.
    """
    with within(group):
        assert_equal_across_ranks("the shape of the gathered rows", f"{tuple(x_b.shape)} of {x_b.dtype}")
        return gather_rows(x_b)


def gather_rows(x_b: torch.Tensor) -> torch.Tensor:
    """Gather rows as ``all_gather_rows`` does, where the shapes are known to be equal."""
    return x_b if world_size() == 1 else _GatherRows.apply(x_b)


class AsyncAllGather:
    """A gather of all ranks' rows that runs while this rank goes on. No gradient."""

    def __init__(self, x_b: torch.Tensor) -> None:
        """Start to send ``x_b`` [b, ...], of the same shape on every rank, and to receive."""
        self._x_B, self._work = x_b.detach().contiguous(), None
        if world_size() > 1:
            self._sent = self._x_B  # kept until it is sent
            self._x_B = x_b.new_empty(world_size() * len(x_b), *x_b.shape[1:])
            self._work = dist.all_gather_into_tensor(self._x_B, self._sent, group=_GROUP.get(), async_op=True)

    def wait(self) -> torch.Tensor:
        """Return [B, ...]. On a GPU its stream waits, not the host."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._x_B


def gather_ragged(x_n: torch.Tensor, counts: Sequence[int] | None = None) -> torch.Tensor:
    """Gather all ranks' rows where their numbers differ. No gradient.

    Args:
        counts: rows of each rank; None: they are asked for, which costs a small collective.
    """
    return torch.cat(_gather_parts(x_n.detach(), counts))


def _gather_parts(x_n: torch.Tensor, counts: Sequence[int] | None = None) -> list[torch.Tensor]:
    """Gather each rank's rows, which travel padded to the most that any rank has."""
    if world_size() == 1:
        return [x_n]
    device = sends_from(x_n.device)
    counts = counts or _GatherRows.apply(torch.tensor([len(x_n)], device=device)).tolist()
    if not any(counts):
        return [x_n]
    padded = x_n.new_zeros(max(counts), *x_n.shape[1:], device=device)
    padded[: len(x_n)] = x_n
    parts = _GatherRows.apply(padded).to(x_n.device).split(max(counts))
    return [part[:n] for part, n in zip(parts, counts, strict=True)]


def sum_across(x: torch.Tensor) -> torch.Tensor:
    """Sum over the ranks, elementwise, into a new tensor. No gradient."""
    total = x.detach().to(sends_from(x.device), copy=True)
    if world_size() > 1:
        dist.all_reduce(total, group=_GROUP.get())
    return total.to(x.device)


def broadcast_(tensors: Sequence[torch.Tensor], source: int = 0) -> None:
    """Overwrite the tensors, in place, with those of rank ``source``."""
    if world_size() > 1:
        for tensor in tensors:
            # A message is memory in order, and ranks may have other strides, such as those of channels_last.
            message = tensor.detach().contiguous()
            dist.broadcast(message, group=_GROUP.get(), group_src=source)
            if not tensor.is_contiguous():
                tensor.detach().copy_(message)


def gather_json(value: Any) -> list[Any]:
    """Gather every rank's value, in rank order, as JSON, which executes nothing."""
    if world_size() == 1:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    return [json.loads(part.numpy().tobytes()) for part in _gather_parts(data)]


def broadcast_object(value: Any) -> Any:
    """Return rank 0's value (anything JSON can hold) on every rank."""
    return gather_json(value if rank() == 0 else None)[0]


def assert_equal_across_ranks(
    what: str, value: str, kind: type[UserError] = RunError, advice: str = "launch every rank with the same settings"
) -> None:
    """Check that every rank holds the same value.

    Args:
        kind: InputError where the value is what a user gave.
        advice: what to do where they differ.

    Raises:
        RunError, InputError: on every rank, with the values and the ranks that have them.
    """
    values = gather_json(value)
    if len(set(values)) > 1:
        raise met_by_all(kind(f"{what} differs: {values_by_rank(values)}; {advice}"))


def values_by_rank(values: Sequence[str]) -> str:
    """List the ranks' values: ``0.1 on ranks 0, 2, 0.5 on rank 1``."""
    holders: dict[str, list[int]] = {}
    for number, value in enumerate(values):
        holders.setdefault(value, []).append(number)
    return ", ".join(
        f"{value} on rank{'s' * (len(who) > 1)} {', '.join(map(str, who[:8]))}{', ...' * (len(who) > 8)}"
        for value, who in holders.items()
    )


def met_by_all(error: UserError) -> UserError:
    """Mark an error that every rank raises, so that one of them prints it."""
    error.on_all_ranks = True
    return error
