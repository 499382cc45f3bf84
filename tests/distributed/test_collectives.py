"""Collectives on 1, 2 and 3 real processes against one-process references."""

import numpy as np
import pytest
import torch

from dist_obdsd.distributed import collectives
from dist_obdsd.distributed.failures import is_timeout, raise_on_all_ranks
from dist_obdsd.errors import InputError, RunError
from dist_obdsd.transfer import wait_for
from tests import harness

worlds = pytest.mark.parametrize("world", harness.WORLD_SIZES)
several = pytest.mark.parametrize("world", [w for w in harness.WORLD_SIZES if w > 1])


def rows_of(rank: int, b: int = 2) -> torch.Tensor:
    return torch.randn(b, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


def rank_loss(x_b: torch.Tensor, x_B: torch.Tensor, rank: int) -> torch.Tensor:
    """Another function on every rank, of own rows and of all rows."""
    weights = torch.arange(1, x_B.numel() + 1, dtype=x_B.dtype).view_as(x_B)
    return (rank + 2) * (x_b @ x_B.T).exp().sum() + (weights * x_B).sin().sum() * (rank + 1)


def gather_worker(with_gradient: bool) -> tuple[np.ndarray, np.ndarray]:
    rank = collectives.rank()
    x_b = rows_of(rank)
    if rank == 0:  # a rank may hold its rows in another order
        x_b = x_b.T.contiguous().T
    x_b.requires_grad_()
    x_B = collectives.gather_rows(x_b)
    rank_loss(x_b, x_B if with_gradient else x_B.detach(), rank).backward()
    assert x_b.grad is not None
    return x_B.detach().numpy(), x_b.grad.numpy()


def gather_reference(world: int) -> tuple[np.ndarray, np.ndarray]:
    x_B = torch.cat([rows_of(rank) for rank in range(world)]).requires_grad_()
    total = sum(rank_loss(x_B[2 * rank : 2 * rank + 2], x_B, rank) for rank in range(world))
    (grad,) = torch.autograd.grad(total, x_B)
    return x_B.detach().numpy(), grad.numpy()


@worlds
def test_gather_rows_and_its_gradient_are_those_of_one_process(world: int) -> None:
    x_B, grad = gather_reference(world)
    for rank, (gathered, own_grad) in enumerate(harness.run(world, gather_worker, True)):
        np.testing.assert_array_equal(gathered, x_B)
        np.testing.assert_allclose(own_grad, grad[2 * rank : 2 * rank + 2], rtol=1e-12)
    # The control: a gather without gradient is noticed.
    for rank, (_, own_grad) in enumerate(harness.run(world, gather_worker, False)):
        assert np.abs(own_grad - grad[2 * rank : 2 * rank + 2]).max() > 0.1


def kinds_worker() -> tuple[list[tuple[str, list[float]]], str]:
    own, gathered = torch.tensor([collectives.rank(), 10 + collectives.rank()]), []
    for kind in (torch.float32, torch.bfloat16, torch.int64, torch.uint8):
        x = collectives.gather_rows(own.to(kind))
        assert x.dtype == kind
        gathered.append(x.tolist())
    with pytest.raises(RunError, match=r"\(2, 3\) of torch.int64"):  # gloo would abort
        collectives.all_gather_rows(torch.zeros(2, 3, dtype=torch.int64 if collectives.rank() else torch.float32))
    with pytest.raises(RunError) as caught:
        collectives.all_gather_rows(torch.zeros(2 + collectives.rank(), 3))
    return gathered, str(caught.value)


@several
def test_gather_rows_keeps_type_and_order_and_refuses_uneven_rows(world: int) -> None:
    expected = [number for r in range(world) for number in (r, 10 + r)]
    for gathered, said in harness.run(world, kinds_worker):
        assert gathered == [expected] * 4
        assert "(2, 3)" in said
        assert "(3, 3)" in said


def sums_worker() -> tuple[np.ndarray, list[list[float]]]:
    rank, world = collectives.rank(), collectives.world_size()
    x = rows_of(rank).requires_grad_()
    total = collectives.sum_across(x)
    assert torch.equal(x, rows_of(rank))  # a new tensor
    found = []
    for i, source in enumerate((0, world - 1)):
        numbers = torch.arange(24.0).view(1, 2, 3, 4) + 100 * rank
        if rank % 2 == i:  # ranks may have other strides
            numbers = numbers.contiguous(memory_format=torch.channels_last)
        collectives.broadcast_([numbers], source)
        found.append(numbers.flatten().tolist())
    return total.numpy(), found  # which a tensor with a gradient refuses


@worlds
def test_sums_and_broadcasts_do_not_depend_on_strides(world: int) -> None:
    expected, numbers = sum(rows_of(rank).numpy() for rank in range(world)), torch.arange(24.0)
    for total, found in harness.run(world, sums_worker):
        np.testing.assert_allclose(total, expected, rtol=1e-15)
        assert found == [numbers.tolist(), (numbers + 100 * (world - 1)).tolist()]


def raise_worker(failures: dict[int, Exception]) -> tuple[str, str]:
    rank = collectives.rank()
    try:
        with raise_on_all_ranks("reading"):
            if rank in failures:
                raise failures[rank]
        outcome = ("none", "")
    except (InputError, RunError) as error:
        outcome = (type(error).__name__, str(error))
    # The group is still in step afterwards.
    assert collectives.gather_json(rank) == list(range(collectives.world_size()))
    return outcome


@worlds
def test_nobody_leaves_alone(world: int) -> None:
    assert harness.run(world, raise_worker, {}) == [("none", "")] * world
    last = world - 1
    for failure, kind in ((InputError("no file; make one"), "InputError"), (RunError("no space"), "RunError"),
                          (OSError("odd"), "RunError")):  # fmt: skip
        answers = harness.run(world, raise_worker, {last: failure})
        assert len(set(answers)) == 1
        assert answers[0][0] == kind
        assert str(failure) in answers[0][1]
        assert (f"rank {last}" in answers[0][1]) == (world > 1)
    # No rank is named where all failed alike.
    answers = harness.run(world, raise_worker, {rank: InputError("no file") for rank in range(world)})
    assert answers == [("InputError", "no file")] * world


class Event:
    """Comes after so many questions."""

    def __init__(self, questions: float) -> None:
        self.left = questions

    def query(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_a_wait_for_a_gpu_that_waits_for_a_hung_rank_times_out() -> None:
    wait_for(Event(3), 60)
    with pytest.raises(RuntimeError) as caught:
        wait_for(Event(float("inf")), 0.01)
    assert is_timeout(caught.value)  # so the run's status names the ranks that hang
