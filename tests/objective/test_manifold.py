"""Targets against an explicit inverse in float64, on easy and nasty batches."""

from typing import Any

import numpy as np
import pytest
import torch

from dist_obdsd.errors import InputError, RunError
from dist_obdsd.objective import manifold
from dist_obdsd.objective.manifold import target_rows
from tests import oracle
from tests.objective.data import B, D, manifolds, unit_rows

MANIFOLDS = manifolds()
TARGETS = ("uniform", "psd", "obdsd", "obdsd_symmetric")
ALL = slice(0, B)


def options(
    target: str, temperature: float = 1.0, transition: float = 1.0, omega: float = 0.5, mask: bool = False
) -> dict[str, Any]:
    return {"target": target, "temperature": temperature, "transition_temperature": transition, "omega": omega,
            "mask_self": mask}  # fmt: skip


def l1(target_bB: torch.Tensor, expected_bB: np.ndarray) -> float:
    return float(np.abs(target_bB.double().numpy() - expected_bB).sum(1).max())


@pytest.mark.parametrize("kind", MANIFOLDS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("mask", [False, True])
def test_float64_targets_equal_the_oracle(kind: str, target: str, mask: bool) -> None:
    T_BD = MANIFOLDS[kind]
    for omega in (0.0, 0.5, 0.99):
        for sharpness in (1.0, 0.05, 0.005):
            chosen = options(target, sharpness, sharpness, omega, mask)
            expected = oracle.target(T_BD.numpy(), **chosen)
            solve = target_rows(T_BD, ALL, **chosen)
            assert solve.target_bB.dtype == torch.float64
            assert l1(solve.target_bB, expected) < 1e-9, (omega, sharpness)
            np.testing.assert_allclose(solve.target_bB.sum(1).numpy(), 1, rtol=1e-9)


@pytest.mark.parametrize("kind", MANIFOLDS)
@pytest.mark.parametrize("target", ["obdsd", "obdsd_symmetric"])
def test_float32_targets_are_as_near_as_their_residual_says(kind: str, target: str) -> None:
    T_BD = MANIFOLDS[kind].float()
    for omega in (0.0, 0.5, 0.99):
        for transition in (1.0, 0.05, 0.005):
            chosen = options(target, 0.1 if target == "obdsd" else transition, transition, omega)
            expected = oracle.target(T_BD.numpy(), **chosen)
            solve = target_rows(T_BD, ALL, **chosen)
            assert solve.target_bB.dtype == torch.float32
            assert float(solve.residual_b.max()) <= manifold.TOLERANCE
            # Besides the solve's error there is the rounding of S itself, 2^-24 / temperature per logit, which
            # the diffusion can multiply by up to 1 / (1 - omega).
            rounding = 8 * 2**-24 / transition / (1 - omega)
            assert l1(solve.target_bB, expected) < manifold.TOLERANCE + rounding, (omega, transition)
            assert (solve.target_bB >= 0).all()


def conjugate_gradients(N_BB: torch.Tensor, omega: float, rows: slice) -> torch.Tensor:
    """Rows of (I - omega N)^-1 with a relative residual of 1e-6 in N's coordinates: what one would call converged."""
    identity_BB = torch.eye(len(N_BB), dtype=N_BB.dtype)
    M_BB, solved = identity_BB - omega * N_BB, []
    for b in identity_BB[rows]:
        x, r = torch.zeros_like(b), b.clone()
        p, rr = r.clone(), r @ r
        while rr.sqrt() > 1e-6:
            step = rr / (p @ M_BB @ p)
            x, r = x + step * p, r - step * (M_BB @ p)
            rr, before = r @ r, rr
            p = r + rr / before * p
        assert (b - M_BB @ x).norm() < 1e-5
        solved.append(x)
    return torch.stack(solved)


def test_an_error_that_only_the_targets_own_coordinates_show_is_seen_and_mended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The trap: going back from N to A multiplies errors by exp((r_j - r_i)/2).
    T_BD = unit_rows(1, 48, 16, 0.5)
    T_BD[3] = -T_BD.mean(0) / T_BD.mean(0).norm()
    T_BD = T_BD.float()
    rows = slice(0, 48)
    chosen = options("obdsd", 0.1, 0.05, 0.5)
    expected = oracle.target(T_BD.numpy(), **chosen)
    monkeypatch.setattr(manifold, "_cholesky_rows", conjugate_gradients)
    monkeypatch.setattr(manifold, "TOLERANCE", 1e9)
    unchecked = target_rows(T_BD, rows, **chosen)
    wrong = l1(unchecked.target_bB, expected)
    assert wrong > 0.1
    assert wrong < 1.1 * float(unchecked.residual_b.max())
    monkeypatch.setattr(manifold, "TOLERANCE", 1e-4)
    assert l1(target_rows(T_BD, rows, **chosen).target_bB, expected) < 1e-4


def test_a_rounding_error_below_zero_never_reaches_the_logarithm(monkeypatch: pytest.MonkeyPatch) -> None:
    real = manifold._cholesky_rows
    monkeypatch.setattr(manifold, "_cholesky_rows", lambda N_BB, omega, rows: real(N_BB, omega, rows) - 1e-8)
    target_BB = target_rows(MANIFOLDS["outliers"].float(), ALL, **options("obdsd", 0.005, 0.05)).target_bB
    assert (target_BB >= 0).all()


@pytest.mark.parametrize("target", ["obdsd", "obdsd_symmetric"])
def test_a_solve_that_nothing_mends_is_an_error(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    def wrong_rows(A_BB: torch.Tensor, omega: float, rows: slice) -> torch.Tensor:
        return torch.eye(len(A_BB), dtype=A_BB.dtype)[rows]

    monkeypatch.setattr(manifold, "_cholesky_rows", wrong_rows)
    monkeypatch.setattr(manifold, "_lu_rows", wrong_rows)
    with pytest.raises(RunError, match=r"error of \d\.\de[+-]\d+ .*lower distillation.omega"):
        target_rows(MANIFOLDS["ordinary"].float(), ALL, **options(target))


def test_published_settings_need_no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifold, "_lu_rows", None)
    for spread in (1.0, 0.1, 0.01):
        T_BD = unit_rows(5, 112, 128, spread).float()
        for omega, transition in ((0.3, 1.0), (0.99, 1.0), (0.5, 0.005)):
            assert target_rows(T_BD, slice(0, 112), **options("obdsd", 1.0, transition, omega)).residual_b.max() < 5e-5
            assert target_rows(T_BD, slice(0, 112), **options("obdsd_symmetric", omega=omega)).residual_b.max() < 5e-5


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("mask", [False, True])
def test_own_rows_are_the_rows_of_the_whole(target: str, mask: bool) -> None:
    T_BD = MANIFOLDS["outliers"]
    chosen = options(target, 0.1, 0.05, 0.9, mask)
    whole = target_rows(T_BD, ALL, **chosen).target_bB
    for W in (2, 3):
        b = B // W
        parts = [target_rows(T_BD, slice(r * b, (r + 1) * b), **chosen).target_bB for r in range(W)]
        assert (torch.cat(parts) - whole).abs().max() < 1e-12


def test_omega_zero_is_psd_and_diffusion_changes_it() -> None:
    T_BD = MANIFOLDS["ordinary"]
    for mask in (False, True):
        psd = target_rows(T_BD, ALL, **options("psd", 0.1, mask=mask)).target_bB
        for target in ("obdsd", "obdsd_symmetric"):
            still = target_rows(T_BD, ALL, **options(target, 0.1, omega=0.0, mask=mask)).target_bB
            assert (still - psd).abs().max() < 1e-14
            moved = target_rows(T_BD, ALL, **options(target, 0.1, omega=0.5, mask=mask)).target_bB
            assert (moved - psd).abs().max() > 0.01


def test_mask_self_empties_the_diagonal_of_p() -> None:
    T_BD = MANIFOLDS["ordinary"]
    assert target_rows(T_BD, ALL, **options("psd", 0.1, mask=True)).target_bB.diagonal().abs().max() == 0
    assert target_rows(T_BD, ALL, **options("psd", 0.1)).target_bB.diagonal().mean() > 0.5


def test_an_isolated_row_keeps_its_own_distribution() -> None:
    T_BD = unit_rows(1, spread=0.2)
    T_BD[0] = -T_BD.mean(0) / T_BD.mean(0).norm()
    assert (T_BD[1:] @ T_BD[0]).max() < 0
    psd = target_rows(T_BD, ALL, **options("psd", 0.5)).target_bB
    diffused = target_rows(T_BD, ALL, **options("obdsd_symmetric", 0.5, omega=0.9)).target_bB
    assert (diffused[0] - psd[0]).abs().max() < 1e-14
    assert (diffused[1] - psd[1]).abs().max() > 1e-3


@pytest.mark.parametrize("target", TARGETS)
def test_half_precision_is_widened_and_autocast_has_no_say(target: str) -> None:
    T_BD = MANIFOLDS["tight"].bfloat16()
    chosen = options(target, 0.1, 0.05, 0.5)
    expected = oracle.target(T_BD.double().numpy(), **chosen)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = target_rows(T_BD, ALL, **chosen).target_bB
        wide = target_rows(T_BD.float(), ALL, **chosen).target_bB
    assert inside.dtype == torch.float32
    assert torch.equal(inside, wide)
    assert l1(inside, expected) < 1e-4


@pytest.mark.parametrize("target", ["psd", "obdsd", "obdsd_symmetric"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_embeddings_give_nan_targets_on_every_rank(target: str, bad: float) -> None:
    T_BD = MANIFOLDS["ordinary"].float()
    T_BD[5, 2] = bad
    for rows in (slice(0, 4), slice(4, 8), slice(8, 12)):
        assert target_rows(T_BD, rows, **options(target)).target_bB.isnan().any()


def test_no_gradient_reaches_the_teacher() -> None:
    T_BD = MANIFOLDS["ordinary"].clone().requires_grad_()
    for target in TARGETS:
        assert not target_rows(T_BD, ALL, **options(target)).target_bB.requires_grad


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="B > 1"):
        target_rows(torch.ones(1, D), slice(0, 1), **options("psd"))
    with pytest.raises(InputError, match="rows 8 to 13"):
        target_rows(torch.ones(B, D), slice(8, 13), **options("psd"))
    with pytest.raises(InputError, match="target none"):
        target_rows(torch.ones(B, D), ALL, **options("none"))
