"""Distances and the spectrum: against loops and an SVD, and the same bits at 1, 2 and 3 real processes."""

import functools

import pytest
import torch

from dist_obdsd.evaluation.geometry import class_distances, rho_spectrum, singular_values
from tests import harness
from tests.evaluation import oracle

D = 6
KINDS = ("random", "unit", "collapsed", "duplicates", "flat", "few")


@functools.cache
def data(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows [n, D], classes of 1, 2, 3, ... images)."""
    random = torch.Generator().manual_seed(KINDS.index(kind))
    n = 4 if kind == "few" else 90
    classes = torch.repeat_interleave(torch.arange(13), torch.arange(13) + 1)[:n]
    rows = torch.randn(13, D, generator=random)[classes] + torch.randn(n, D, generator=random)
    if kind == "unit":
        rows = torch.nn.functional.normalize(rows)
    if kind == "collapsed":
        rows = torch.full_like(rows, 0.4)
    if kind == "duplicates":
        rows = rows[torch.arange(n) % 5].double()
    if kind == "flat":  # two dimensions are never used
        rows[:, 2:4] = 0
    return rows, classes


def worker(kind: str, cosine: bool, threads: int = 1) -> tuple[dict[str, float], float, float]:
    rows, classes = data(kind)
    torch.set_num_threads(threads)
    distances, singular = class_distances(rows, classes, cosine=cosine), singular_values(rows)
    torch.set_num_threads(1)
    return distances, rho_spectrum(singular), rho_spectrum(singular, leave_out=1)


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_loops_say_the_same_on_any_ranks(kind: str, cosine: bool) -> None:
    rows, classes = data(kind)
    answers = [
        answer
        for world in harness.WORLD_SIZES
        for threads in (1, 2)
        for answer in harness.run(world, worker, kind, cosine, threads)
    ]
    assert all(answer == answers[0] for answer in answers)
    distances, rho, rho_released = answers[0]
    plain = rows.double().tolist()
    assert distances == pytest.approx(
        oracle.class_distances(plain, classes.tolist(), cosine=cosine), abs=1e-7 if kind == "collapsed" else 1e-12
    )
    assert rho == pytest.approx(oracle.rho_spectrum(plain), abs=1e-6)
    assert rho_released == pytest.approx(oracle.rho_spectrum(plain, leave_out=1), abs=1e-6)
    assert rho_released != rho
