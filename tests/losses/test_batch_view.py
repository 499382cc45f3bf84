"""Similarities and their gradient."""

import pytest
import torch

from dist_obdsd.losses.batch_view import BatchView
from dist_obdsd.manifold.similarity import similarity
from tests.manifold.data import B, unit_rows

LABELS_B = torch.arange(B)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_gradient_of_one_factor_is_that_of_two(dtype: torch.dtype) -> None:
    weights_BB = unit_rows(1, B, B)
    gradients = []
    for separate in (False, True):
        E_BD = unit_rows(0).to(dtype).requires_grad_()
        view = BatchView(E_BD, E_BD.clone() if separate else E_BD, LABELS_B, 0)
        assert view.S_bB.dtype == torch.promote_types(dtype, torch.float32)
        (gradient,) = torch.autograd.grad((view.S_bB * weights_BB).sum(), E_BD)
        gradients.append(gradient)
    assert gradients[0].dtype == dtype
    assert torch.allclose(*gradients, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_the_gradient_is_that_of_finite_differences() -> None:
    assert torch.autograd.gradcheck(lambda x: similarity(x, x), [unit_rows(0).requires_grad_()])


def test_autocast_has_no_say_in_the_backward_either() -> None:
    E_BD = unit_rows(0).float().requires_grad_()
    S_BB, weights_BB = BatchView(E_BD, E_BD, LABELS_B, 0).S_bB, unit_rows(1, B, B).float()
    (outside,) = torch.autograd.grad((S_BB * weights_BB).sum(), E_BD, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (inside,) = torch.autograd.grad((S_BB * weights_BB).sum(), E_BD)
    assert torch.equal(inside, outside)
