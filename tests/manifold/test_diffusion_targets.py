"""The diffusion as a function, and targets of somebody else's."""

import numpy as np
import pytest
import torch

from dist_obdsd import diffusion_targets
from dist_obdsd.errors import InputError
from dist_obdsd.manifold.diffusion import Diffusion
from dist_obdsd.manifold.targets import target_rows
from tests import oracle
from tests.manifold.data import unit_rows


def half_uniform(T_BD: torch.Tensor, rows: slice, diffusion: Diffusion) -> torch.Tensor:
    """A target of somebody else's: between psd and uniform."""
    psd_bB = target_rows(T_BD, rows, Diffusion("psd", diffusion.temperature)).target_bB
    return (psd_bB + 1 / len(T_BD)) / 2


def test_a_target_can_be_a_function_by_its_import_path() -> None:
    T_BD, rows = unit_rows(0), slice(2, 6)
    path = f"{__name__}:half_uniform"
    found = target_rows(T_BD, rows, Diffusion(path, 0.2)).target_bB
    assert torch.equal(found, half_uniform(T_BD, rows, Diffusion("psd", 0.2)))
    with pytest.raises(InputError, match=r"distillation\.target=nowhere:f cannot be imported"):
        target_rows(T_BD, rows, Diffusion("nowhere:f"))


@pytest.mark.parametrize("symmetric", [False, True])
def test_diffusion_targets_are_those_of_the_objective(symmetric: bool) -> None:
    T_BD = unit_rows(0)
    chosen = {"temperature": 0.2, "transition_temperature": 0.3, "omega": 0.7}
    target = "obdsd_symmetric" if symmetric else "obdsd"
    expected = oracle.target(T_BD.numpy(), target=target, mask_self=False, **chosen)
    assert np.abs(diffusion_targets(T_BD, symmetric=symmetric, **chosen).numpy() - expected).max() < 1e-9
    own = diffusion_targets(T_BD, slice(3, 5), symmetric=symmetric, **chosen)
    assert np.abs(own.numpy() - expected[3:5]).max() < 1e-9
    with pytest.raises(InputError, match="step"):
        diffusion_targets(T_BD, slice(0, 6, 2))
