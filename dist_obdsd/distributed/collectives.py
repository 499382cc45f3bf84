"""All messages between ranks. No other module calls a torch.distributed collective.

Without a process group, each function works as in a world of one. Shapes: b rows here, B = W * b rows on all ranks.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from dist_obdsd.errors import RunError, UserError


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_b: torch.Tensor) -> torch.Tensor:
        x_b = x_b.contiguous()
        x_B = x_b.new_empty(world_size() * x_b.shape[0], *x_b.shape[1:])
        dist.all_gather_into_tensor(x_B, x_b)
        return x_B

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        # Every rank's loss depends on these rows, so their gradient is the sum over the ranks.
        grad_B = grads[0].contiguous()
        grad_b = grad_B.new_empty(grad_B.shape[0] // world_size(), *grad_B.shape[1:])
        dist.reduce_scatter_tensor(grad_b, grad_B, op=dist.ReduceOp.SUM)
        return grad_b


def gather_rows(x_b: torch.Tensor, check_sizes: bool = True) -> torch.Tensor:
    """Gather the rows of all ranks, with exact gradient: backward sums over the ranks and returns own rows.

    Args:
        x_b: [b, ...], the same shape on every rank.
        check_sizes: compare the shapes first, which costs a small collective. A training step checks once, since its
            sizes come from a config that all ranks share.

    Returns:
        [B, ...] with rank r's rows at r*b to (r+1)*b.

    Raises:
        RunError: on every rank, when the shapes differ.
    """
    if world_size() == 1:
        return x_b
    if check_sizes:
        assert_equal_across_ranks("the shape of the gathered rows", str(tuple(x_b.shape)))
    return _GatherRows.apply(x_b)


class AsyncAllGather:
    """A gather of all ranks' rows, in rank order, that runs while this rank goes on. No gradient."""

    def __init__(self, x_b: torch.Tensor) -> None:
        """Start to send ``x_b`` [b, ...], of the same shape on every rank, and to receive."""
        self.B = world_size() * x_b.shape[0]
        self._x_B, self._work = x_b.detach().contiguous(), None
        if world_size() > 1:
            self._sent, self._x_B = self._x_B, x_b.new_empty(self.B, *x_b.shape[1:])  # kept until it is sent
            self._work = dist.all_gather_into_tensor(self._x_B, self._sent, async_op=True)

    def wait(self) -> torch.Tensor:
        """Return [B, ...]. On a GPU its stream waits, not the host."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._x_B


def gather_ragged(x_n: torch.Tensor) -> torch.Tensor:
    """Gather the rows of all ranks, in rank order, when their numbers differ. No gradient."""
    x_n = x_n.detach()
    if world_size() == 1:
        return x_n
    counts = gather_json(x_n.shape[0])
    if not any(counts):
        return x_n
    padded = x_n.new_zeros(max(counts), *x_n.shape[1:])
    padded[: x_n.shape[0]] = x_n
    parts = _GatherRows.apply(padded).split(max(counts))
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])


def sum_across(x: torch.Tensor) -> torch.Tensor:
    """Sum over the ranks, elementwise, into a new tensor. No gradient."""
    total = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def average_gradients_(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Replace the parameters' gradients, in place, by their mean over the ranks, in one message.

    A missing gradient counts as 0, so that a rank whose part of the loss did not touch a parameter still takes part.
    """
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if world_size() == 1 or not parameters:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def broadcast_(tensors: Sequence[torch.Tensor], source: int = 0) -> None:
    """Overwrite the tensors, in place, with those of rank ``source``."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=source)


def ring_pass(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Send the tensors to the next rank and receive those of the previous one. All ranks have the same shapes."""
    if world_size() == 1:
        return list(tensors)
    following, previous = (rank() + 1) % world_size(), (rank() - 1) % world_size()
    received = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]
    operations = [dist.P2POp(dist.isend, tensor.contiguous(), following) for tensor in tensors]
    operations += [dist.P2POp(dist.irecv, tensor, previous) for tensor in received]
    for request in dist.batch_isend_irecv(operations):
        request.wait()
    return received


def ring_rotate(
    block: torch.Tensor, height: int, others: Sequence[torch.Tensor], visit: Callable[..., None]
) -> list[torch.Tensor]:
    """Send a block of this rank's rows round all ranks, and return it with what their visits wrote into it.

    Args:
        block: [m, ...], m at most ``height`` and different on every rank.
        height: the same on every rank.
        others: tensors of ``height`` rows that travel along.
        visit: called on every rank with (hop, the m rows, the first m rows of each of the others); writes in place.

    Returns:
        The block and the others, ``height`` rows each.
    """
    count = torch.tensor([block.shape[0]], device=block.device)
    travelling = [count, padded(block, height, 0), *others]
    for hop in range(world_size()):
        m = int(travelling[0])
        visit(hop, *(tensor[:m] for tensor in travelling[1:]))
        travelling = ring_pass(travelling)
    return travelling[1:]


def padded(x: torch.Tensor, height: int, value: float) -> torch.Tensor:
    """Pad ``x`` with rows of ``value`` up to ``height`` rows."""
    if x.shape[0] == height:
        return x
    return torch.cat([x, x.new_full((height - x.shape[0], *x.shape[1:]), value)])


def gather_json(value: Any) -> list[Any]:
    """Gather every rank's value (anything JSON can hold), in rank order. JSON, since a pickle could execute code."""
    if world_size() == 1:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = torch.empty(world_size(), dtype=torch.int64)
    dist.all_gather_into_tensor(sizes, torch.tensor([data.numel()]))
    padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
    padded[: data.numel()] = data
    parts = torch.empty(world_size() * padded.numel(), dtype=torch.uint8)
    dist.all_gather_into_tensor(parts, padded)
    return [
        json.loads(part[:size].numpy().tobytes())
        for part, size in zip(parts.view(world_size(), -1), sizes.tolist(), strict=True)
    ]


def broadcast_object(value: Any) -> Any:
    """Return rank 0's value (anything JSON can hold) on every rank."""
    return gather_json(value if rank() == 0 else None)[0]


def assert_equal_across_ranks(what: str, value: str, kind: type[UserError] = RunError) -> None:
    """Check that every rank holds the same value.

    Args:
        kind: InputError where the value is what a user gave.

    Raises:
        RunError, InputError: on every rank, with the values and the ranks that have them.
    """
    values = gather_json(value)
    if len(set(values)) > 1:
        message = f"{what} differs: {values_by_rank(values)}; launch every rank with the same settings"
        raise met_by_all(kind(message))


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
