"""KL against a double loop, value and gradient, and what the target's figures say."""

import math

import pytest
import torch

from dist_obdsd.errors import InputError
from dist_obdsd.losses.batch_view import PartialMean
from dist_obdsd.losses.distillation import distil
from dist_obdsd.manifold.similarity import similarity
from tests import oracle
from tests.manifold.data import B, manifolds, unit_rows

SHARP = {"target": "psd", "transition_temperature": 1.0, "omega": 0.0}


def kl_term(E_BD: torch.Tensor, target_BB: torch.Tensor, temperature: float) -> PartialMean:
    return distil(similarity(E_BD, E_BD), target_BB, temperature, 0)["distillation"]


def target_statistics(target_bB: torch.Tensor, first_row: int) -> dict[str, PartialMean]:
    terms = distil(torch.zeros_like(target_bB), target_bB, 1.0, first_row)
    return {name: term for name, term in terms.items() if name.startswith("target_")}


def psd(T_BD: torch.Tensor, temperature: float, mask_self: bool = False) -> torch.Tensor:
    return torch.from_numpy(oracle.target(T_BD.numpy(), temperature=temperature, mask_self=mask_self, **SHARP))


@pytest.mark.parametrize("kind", manifolds())
@pytest.mark.parametrize("temperature", [1.0, 0.05, 0.005])
@pytest.mark.parametrize("mask_self", [False, True])
def test_value_and_gradient_equal_the_double_loop(kind: str, temperature: float, mask_self: bool) -> None:
    target_BB = psd(manifolds()[kind], temperature, mask_self)
    E_BD, naive_BD = (unit_rows(9).requires_grad_() for _ in range(2))
    term, naive = kl_term(E_BD, target_BB, temperature), oracle.kl(naive_BD, target_BB.numpy(), temperature)
    assert term.count.item() == B
    assert term.sum.item() == pytest.approx(naive.item(), rel=1e-11, abs=1e-12)
    (grad,), (naive_grad,) = torch.autograd.grad(term.sum, E_BD), torch.autograd.grad(naive, naive_BD)
    assert (grad - naive_grad).abs().max() <= 1e-11 * (1 + naive_grad.abs().max())


def test_half_precision_is_widened_and_autocast_has_no_say() -> None:
    E_BD, target_BB = unit_rows(9).bfloat16().requires_grad_(), psd(unit_rows(0), 0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        term = kl_term(E_BD, target_BB.float(), 0.05)
    assert term.sum.dtype == torch.float32
    naive = oracle.kl(E_BD.detach(), target_BB.numpy(), 0.05).item()
    assert term.sum.item() == pytest.approx(naive, rel=1e-5)
    careless = distil((E_BD @ E_BD.T).float(), target_BB.float(), 0.05, 0)["distillation"].sum.item()
    assert abs(careless - naive) > 1e-4 * naive


def test_statistics_of_known_targets() -> None:
    eye_BB, log_B = torch.eye(B, dtype=torch.float64), math.log(B)
    for target_bB, first_row, expected in (  # entropy, divergence from uniform, self-mass, defects of a row
        (torch.full((4, B), 1 / B, dtype=torch.float64), 4, (log_B, 0, 1 / B, 0)),
        (eye_BB[4:8], 4, (0, log_B, 1, 0)),
        (eye_BB[4:8], 0, (0, log_B, 0, 0)),
    ):
        found = target_statistics(target_bB, first_row).values()
        assert [term.sum.item() / 4 for term in found] == pytest.approx(expected, abs=1e-12)
        assert {term.count.item() for term in found} == {4}


def test_rows_that_are_no_distribution_are_counted() -> None:
    target_bB = torch.full((5, B), 1 / B, dtype=torch.float64)
    target_bB[0] *= 1 + 9e-5
    target_bB[1] *= 1 + 2e-4
    target_bB[2, :2] += torch.tensor([-0.2, 0.2])
    target_bB[3, 4] = math.nan
    defects = target_statistics(target_bB, 0)["target_defects"]
    assert (defects.sum.item(), defects.count.item()) == (3, 5)


def test_a_wrong_shape_is_refused() -> None:
    with pytest.raises(InputError, match=r"target has shape \(12, 11\); it must be \(12, 12\)"):
        kl_term(unit_rows(0), torch.ones(B, B - 1), 0.1)
