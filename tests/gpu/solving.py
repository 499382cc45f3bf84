"""The diffusion's solvers beside a dense inverse in float64 on the CPU, on easy and on nasty batches.

Legend: B rows of the batch, D embedding dimension.
"""

import torch
from torch.nn import functional

from benchmarks import reference
from dist_obdsd.manifold import targets as manifold
from dist_obdsd.manifold.diffusion import Diffusion
from tests.gpu.rig import CPU, started, within

CASES = ((1.0, 0.3), (0.1, 0.5), (0.005, 0.5), (0.005, 0.99))
"""Transition temperature and omega: CUB200's, between the two, SOP's, and CARS196's omega at SOP's temperature."""


def batches(B: int, D: int = 64) -> dict[str, torch.Tensor]:
    """Unit rows in pairs; such with near-duplicates; and such with outliers besides."""
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(B // 2, D, generator=draw).repeat_interleave(2, 0)
    ordinary = functional.normalize(centres + torch.randn(B, D, generator=draw), dim=1)
    duplicates = ordinary.clone()
    duplicates[1::4] = functional.normalize(duplicates[::4] + 1e-4 * torch.randn(B // 4, D, generator=draw), dim=1)
    outliers = duplicates.clone()
    outliers[7] = functional.normalize(-ordinary.mean(0), dim=0)
    return {"pairs": ordinary, "near-duplicates": duplicates, "outliers": outliers}


def solvers_agree(device: torch.device, quick: bool) -> str:
    """Series, Cholesky and conjugate gradients, in float32 where TF32 was allowed before the process began.

    The largest L1 error of a row may be the tolerance that the solver promises and what float32's rounding of the
    cosines, 1e-7 or so, becomes when it is divided by the temperature and the diffusion adds it up.
    """
    B, worst = (64 if quick else 448), ("", 0.0)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True  # as some other library may have it; 10 bits would not do
    try:
        with started(device):
            for name, T_BD in batches(B).items():
                for temperature, omega in CASES:
                    settings = {"temperature": 0.1, "transition_temperature": temperature, "omega": omega}
                    wanted_BB = reference.target(T_BD.double(), _distillation("auto", settings))
                    limit = 1e-4 + 4e-7 / temperature / (1 - omega)
                    for solver in ("auto", "cholesky", "cg"):
                        found = manifold.target_rows(T_BD.to(device), slice(0, B), _distillation(solver, settings))
                        error = float((found.target_bB.to(CPU).double() - wanted_BB).abs().sum(1).max())
                        case = f"{solver} on {name}, t={temperature:g}, omega={omega:g}: L1 error"
                        within(case, error, limit)
                        worst = max(worst, (case, error / limit), key=lambda item: item[1])
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return f"worst share of what is allowed: {worst[1]:.0%} ({worst[0].partition(':')[0]})"


def _distillation(solver: str, settings: dict[str, float]) -> Diffusion:
    return Diffusion(solver=solver, **settings)
