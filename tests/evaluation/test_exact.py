"""Sums that no order changes: against Python's integers and fractions, with a float sum as control."""

from fractions import Fraction

import pytest
import torch

from dist_obdsd.distributed import collectives
from dist_obdsd.evaluation.exact import FixedPoint, gram, group_means, largest_entry
from tests import harness

N, D = 400, 7


def rows(scale: float = 1.0) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return scale * torch.randn(N, D, dtype=torch.float64, generator=random) ** 3


def worker(order: str, scale: float) -> tuple[list, list, list, float]:
    """(group means, sizes, Gram matrix, plain float sum of one column) of the images in some distribution."""
    mine = (torch.arange(N) if order == "forward" else torch.arange(N).flip(0)).tensor_split(
        [50 * (r + 1) for r in range(collectives.world_size() - 1)]
    )[collectives.rank()]
    x = rows(scale)[mine]
    means, sizes = group_means(x, mine % 4, 5)
    column = collectives.sum_across(x[:, 0].cumsum(0)[-1:])
    return means.tolist(), sizes.tolist(), gram(x).tolist(), float(column)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_the_same_bits_in_any_order_on_any_number_of_ranks(scale: float) -> None:
    answers = [
        answer
        for world in harness.WORLD_SIZES
        for order in ("forward", "backward")
        for answer in harness.run(world, worker, order, scale)
    ]
    assert all(answer[:3] == answers[0][:3] for answer in answers)
    assert len({answer[3] for answer in answers}) > 1  # control: float sums differ
    means, sizes, squares, _ = answers[0]
    x = rows(scale)
    assert sizes == [100, 100, 100, 100, 0]
    assert means[4] == [0.0] * D
    largest = x.abs().max().item()
    for group in range(4):
        exact = [sum(Fraction(v) for v in column) / 100 for column in x[group::4].T.tolist()]
        assert all(abs(a - b) <= largest * 2**-50 for a, b in zip(means[group], exact, strict=True))
    exact = x.numpy().T @ x.numpy()
    assert (torch.tensor(squares, dtype=torch.float64) - torch.from_numpy(exact)).abs().max() < N * largest**2 * 2**-29


def test_the_gram_matrix_of_rounded_entries_is_exact() -> None:
    whole = (rows() * 1000).round().long()
    expected = [[sum(a * b for a, b in zip(x, y, strict=True)) for y in whole.T.tolist()] for x in whole.T.tolist()]
    assert gram(whole.double()).tolist() == expected
    assert gram(torch.zeros(3, 2)).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert gram(torch.zeros(0, 2)).tolist() == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize(("largest", "count"), [(1.0, 1), (1.0, 1 << 40), (5e-324, 10), (1e300, 1 << 20), (0.0, 7)])
def test_the_largest_sum_fits(largest: float, count: int) -> None:
    number = FixedPoint(largest, count)
    code = int(number.encode(torch.tensor(largest, dtype=torch.float64)))
    assert code * count < 2**63
    assert float(number.decode(torch.tensor(code))) == pytest.approx(
        largest, rel=2.0 ** -(60 - count.bit_length()), abs=1e-300
    )


def test_the_largest_entry_of_all_ranks() -> None:
    for world in harness.WORLD_SIZES:
        assert set(harness.run(world, largest_worker)) == {float(world)}


def largest_worker() -> float:
    last = collectives.rank() == collectives.world_size() - 1
    mine = (
        torch.zeros(0, 3) if collectives.rank() == 0 and not last else torch.tensor([[0.5, -1.0 - collectives.rank()]])
    )
    return largest_entry(mine)
