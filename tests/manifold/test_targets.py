"""Targets against an explicit inverse in float64, on easy and nasty batches."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from dist_obdsd import diffusion_targets
from dist_obdsd.errors import InputError, RunError
from dist_obdsd.manifold import graph, solvers
from dist_obdsd.manifold import targets as manifold
from dist_obdsd.manifold.diffusion import Diffusion
from dist_obdsd.manifold.targets import DiffusionTarget
from tests import oracle
from tests.manifold.data import B, D, manifolds, unit_rows

MANIFOLDS = manifolds()
TARGETS = ("uniform", "psd", "obdsd", "obdsd_symmetric")
ALL = slice(0, B)
TOLERANCE = Diffusion().tolerance
SOLVERS = ("cholesky", "cg")


def target_rows(
    T_BD: torch.Tensor, rows: slice, memory_MD: torch.Tensor | None = None, **options: Any
) -> DiffusionTarget:
    return manifold.target_rows(T_BD, rows, Diffusion(**options), memory_MD)


def options(
    target: str, temperature: float = 1.0, transition: float = 1.0, omega: float = 0.5, mask: bool = False
) -> dict[str, Any]:
    return {"target": target, "temperature": temperature, "transition_temperature": transition, "omega": omega,
            "mask_self": mask}  # fmt: skip


def l1(target_bB: torch.Tensor, expected_bB: np.ndarray) -> float:
    return float(np.abs(target_bB.double().numpy() - expected_bB).sum(1).max())


def error(T_BD: torch.Tensor, rows: slice, chosen: dict[str, Any], **how: Any) -> float:
    """The largest L1 error of a row. ``how`` it is solved does not change what it is."""
    return l1(target_rows(T_BD, rows, **chosen, **how).target_bB, oracle.target(T_BD.numpy(), **chosen)[rows])


@pytest.mark.parametrize("kind", MANIFOLDS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_targets_equal_the_oracle(kind, target, dtype):
    T_BD, diffused = MANIFOLDS[kind].to(dtype), target.startswith("obdsd")
    for omega, sharpness, solver in itertools.product((0.0, 0.5, 0.99), (1.0, 0.05, 0.005), SOLVERS):
        if not diffused and omega != 0.5:
            continue
        temperature = 0.1 if dtype == torch.float32 and target != "obdsd_symmetric" else sharpness
        chosen = options(target, temperature, sharpness, omega, mask=solver == "cg")
        solve = target_rows(T_BD, ALL, **chosen, solver=solver)
        assert solve.target_bB.dtype == dtype
        assert (solve.target_bB >= 0).all()
        np.testing.assert_allclose(solve.target_bB.sum(1).numpy(), 1, rtol=1e-9 if dtype == torch.float64 else 1e-4)
        # Besides the solve's error, which the residual bounds, float32 rounds S itself, by 2^-24 / temperature a logit,
        # which the diffusion can multiply by up to 1 / (1 - omega).
        assert float(solve.error_b.max()) <= TOLERANCE
        bound = 1e-9 if dtype == torch.float64 else TOLERANCE + 8 * 2**-24 / sharpness / (1 - omega)
        assert l1(solve.target_bB, oracle.target(T_BD.numpy(), **chosen)) < bound, (omega, sharpness, solver)


def outliers(rows: int = 48, dim: int = 16) -> torch.Tensor:
    """A crowd, one row opposite to it and one near-duplicate: going back from N to A multiplies errors."""
    T_BD = unit_rows(1, rows, dim, 0.5)
    T_BD[3] = -T_BD.mean(0) / T_BD.mean(0).norm()
    T_BD[5] = functional.normalize(T_BD[4] + 1e-4 * T_BD[6], dim=0)
    return T_BD.float()


class Careless(solvers.ConjugateGradients):
    """A relative residual of 1e-6 in N's coordinates: what one would call converged."""

    def _solve(self, C_bn: torch.Tensor, *_: Any) -> tuple[torch.Tensor, int]:
        noise_bn = torch.randn(C_bn.shape, generator=torch.Generator().manual_seed(0))
        off_bn = C_bn + 1e-6 * C_bn.norm(dim=1, keepdim=True) * functional.normalize(noise_bn)
        M_nn = torch.eye(C_bn.shape[1]) - self._graph.diffusion.omega * self._graph.symmetric(self._graph.tiles[0])
        return torch.linalg.solve(M_nn, off_bn.T).T, 0


@pytest.mark.parametrize("careless", [False, True])
def test_an_error_that_only_the_targets_own_coordinates_show_is_mended(monkeypatch, careless):
    # The trap: going back from N to A multiplies errors by exp((r_j - r_i)/2).
    T_BD, rows, chosen = outliers(), slice(0, 48), options("obdsd", 0.1, 0.05, 0.5)
    if careless:
        monkeypatch.setattr(solvers, "ConjugateGradients", Careless)
        unchecked = target_rows(T_BD, rows, **chosen, solver="cg", tolerance=1e9)
        expected = oracle.target(T_BD.numpy(), **chosen)
        assert 0.1 < l1(unchecked.target_bB, expected) < 1.1 * float(unchecked.error_b.max())
    assert error(T_BD, rows, chosen, solver="cg") < 1e-4


@pytest.mark.parametrize("target", ["obdsd", "obdsd_symmetric"])
@pytest.mark.parametrize("omega", [0.5, 0.99])
@pytest.mark.parametrize("height", [5, 48])
def test_outliers_and_near_duplicates_at_sharp_temperatures(monkeypatch, target, omega, height):
    T_BD, rows, chosen = outliers(), slice(8, 24), options(target, 0.1, 0.005, omega)
    bound = TOLERANCE + 8 * 2**-24 / 0.005 / (1 - omega)
    monkeypatch.setitem(graph.TILE_ENTRIES, "cpu", height * 48)
    for how in ({"solver": "cholesky"}, {"solver": "cg"}, {"solver": "cg", "memory_gib": 1e-9}):
        assert error(T_BD, rows, chosen, **how) < bound


def test_a_rounding_error_below_zero_never_reaches_the_logarithm(monkeypatch):
    for name in ("cholesky_solve", "cholesky_inverse"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *arguments, real=real: real(*arguments) - 1e-8)
    for rows in (ALL, slice(2, 4)):
        target_bB = target_rows(MANIFOLDS["outliers"].float(), rows, **options("obdsd", 0.005, 0.05)).target_bB
        assert (target_bB >= 0).all()


class Idle(solvers.ConjugateGradients):
    def _solve(self, C_bn: torch.Tensor, *_: Any) -> tuple[torch.Tensor, int]:
        return torch.zeros_like(C_bn), 0


def test_what_float32_cannot_solve_is_solved_in_float64_also_without_room():
    T_BD, chosen = MANIFOLDS["outliers"].float(), options("obdsd_symmetric", 0.1, 1.0, 0.99)
    narrow = graph.Graph(T_BD, Diffusion(**chosen, memory_gib=1e-9))
    assert solvers.solve_rows(narrow, ALL, "cg", TOLERANCE).worst > TOLERANCE
    solve = target_rows(T_BD, ALL, **chosen, memory_gib=1e-9)
    assert solve.target_bB.dtype == torch.float32
    assert l1(solve.target_bB, oracle.target(T_BD.numpy(), **chosen)) < TOLERANCE


@pytest.mark.parametrize("target", ["obdsd", "obdsd_symmetric"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solve_that_nothing_mends_is_an_error(monkeypatch, target, solver):
    monkeypatch.setattr(solvers, "Cholesky", lambda graph: Idle(graph, None, 0.0))
    monkeypatch.setattr(solvers, "ConjugateGradients", Idle)
    with pytest.raises(RunError, match=r"error of \d\.\de[+-]\d+ .*tolerance=0.0001 is needed; lower"):
        target_rows(MANIFOLDS["ordinary"].float(), ALL, **options(target), solver=solver)


@pytest.mark.parametrize("solver", SOLVERS)
def test_published_settings_need_no_fallback(monkeypatch, solver):
    monkeypatch.setattr(torch.Tensor, "double", None)  # which a second solve would begin with
    for spread in (1.0, 0.1, 0.01):
        T_BD = unit_rows(5, 112, 128, spread).float()
        for omega, transition in ((0.3, 1.0), (0.99, 1.0), (0.5, 0.005)):
            for chosen in (options("obdsd", 1.0, transition, omega), options("obdsd_symmetric", omega=omega)):
                solve = target_rows(T_BD, slice(0, 112), **chosen, solver=solver)
                assert solve.error_b.max() < (5e-5 if solver == "cholesky" else TOLERANCE)
                assert solve.iterations <= 12


@pytest.mark.parametrize(("omega", "transition"), [(0.0, 1.0), (0.3, 1.0), (0.9, 1.0), (0.99, 1.0), (0.5, 0.5)])
@pytest.mark.parametrize("spread", [1.0, 0.1])
def test_where_the_walk_forgets_at_once_its_series_is_solver_enough(monkeypatch, spread, omega, transition):
    T_BD, chosen = unit_rows(5, 56, 64, spread).float(), options("obdsd", 1.0, transition, omega)
    with monkeypatch.context() as patch:
        patch.setattr(solvers, "Cholesky", None)
        patch.setattr(solvers, "ConjugateGradients", None)
        whole = target_rows(T_BD, slice(0, 56), **chosen)
        assert 1 <= whole.iterations <= solvers.NEUMANN_STEPS
        assert float(whole.error_b.max()) <= min(TOLERANCE, 2e-6 / (1 - omega))
        for rows in (slice(0, 56), slice(14, 42)):  # as good as Cholesky's, so that a rank's share does not show
            assert error(T_BD, rows, chosen) < 2e-6
    monkeypatch.setattr(solvers, "neumann_rows", None)  # and only where nobody asked for another solver
    for solver in SOLVERS:
        target_rows(T_BD, slice(14, 42), **chosen, solver=solver)


def test_the_bound_of_a_series_holds_whatever_it_starts_from(monkeypatch):
    walk = graph.WalkGraph(unit_rows(5, 48, 32), Diffusion(omega=0.1, transition_temperature=0.5))
    M_BB = torch.eye(48) - 0.1 * walk.transition(slice(0, 48))
    monkeypatch.setattr(solvers, "ROUNDING", 1e-3 / torch.finfo(torch.float64).eps)
    for size in (1e-4, 1e-6):
        wrong_BB = torch.linalg.inv(M_BB) + size * torch.randn(48, 48, dtype=torch.float64)
        monkeypatch.setattr(walk, "initial_guess", lambda rows, A_nn, wrong_BB=wrong_BB: wrong_BB[rows].clone())
        inverse = solvers.neumann_rows(walk, slice(0, 24), 1e-3)
        residual_b = (torch.eye(48)[:24] - inverse.Y_bn @ M_BB).abs().sum(1)
        assert 1e-3 < float((residual_b / inverse.error_b).max()) <= 1
        assert float(inverse.error_b.max()) <= 1e-3


def test_where_the_series_is_slow_or_broken_a_solver_takes_over(monkeypatch):
    products, real = [], solvers._series
    monkeypatch.setattr(
        solvers, "_series", lambda *given: ((products.append(1) or taken) for taken in real(*given))
    )  # fmt: skip
    T_BD, rows = outliers(), slice(0, 48)
    for omega, transition in ((0.5, 0.005), (0.9, 0.05), (0.99, 0.005)):
        chosen = options("obdsd", 0.1, transition, omega)
        products.clear()
        solve = target_rows(T_BD, rows, **chosen)
        assert (len(products), solve.iterations) == (1, 0)  # a product is enough to see it
        assert l1(solve.target_bB, oracle.target(T_BD.numpy(), **chosen)) < TOLERANCE + 2e-5 / (1 - omega)
    monkeypatch.setattr(graph.WalkGraph, "initial_guess", lambda self, rows, A_nn: torch.full((48, 48), torch.nan))
    assert error(T_BD, rows, options("obdsd", 0.1, 1.0, 0.5)) < TOLERANCE


def test_the_known_eigenvector_is_kept_out_of_the_iteration(monkeypatch):
    T_BD = unit_rows(5, 112, 128).float()
    for target in (graph.WalkGraph, graph.Graph):
        made = target(T_BD, Diffusion(omega=0.99))
        N_BB, u_B = made.symmetric(slice(0, 112)), made.top_eigenvector_n
        assert (N_BB @ u_B - u_B).abs().max() < 1e-6
        assert (N_BB - N_BB.T).abs().max() < 1e-6
        assert torch.linalg.eigvalsh(N_BB.double()).abs().max() == pytest.approx(1, abs=1e-6)
    assert target_rows(T_BD, slice(0, 112), **options("obdsd", omega=0.99), solver="cg").iterations <= 4
    ignored = property(lambda self: torch.zeros(112), lambda self, u: None)
    monkeypatch.setattr(graph.WalkGraph, "top_eigenvector_n", ignored)
    assert target_rows(T_BD, slice(0, 112), **options("obdsd", omega=0.99), solver="cg").iterations > 4


@pytest.mark.parametrize("target", ["obdsd", "obdsd_symmetric"])
@pytest.mark.parametrize(
    "sharpening",
    [
        {}, {"neighbours": 3}, {"neighbours": 3, "mutual": True}, {"neighbours": 1, "mutual": True}, {"neighbours": 50},
        {"clip": True}, {"clip": True, "power": 3.0}, {"neighbours": 4, "clip": True, "power": 0.5},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("kind", ["tight", "outliers", "equal"])
def test_sharpened_targets_equal_the_oracle(monkeypatch, target, sharpening, kind):
    T_BD = MANIFOLDS[kind]
    chosen = options(target, 0.1, 0.05, 0.9) | sharpening
    for solver in SOLVERS:
        assert error(T_BD, ALL, chosen, solver=solver) < 1e-9
    monkeypatch.setitem(graph.TILE_ENTRIES, "cpu", 5 * B)
    monkeypatch.setattr(manifold, "PART_ENTRIES", 3 * B)
    assert error(T_BD, slice(2, 10), chosen, memory_gib=1e-9) < 1e-9  # in tiles and parts


def test_without_room_no_matrix_over_all_pairs_is_made(monkeypatch):
    shapes = []
    real = graph.similarity
    monkeypatch.setattr(graph, "similarity", lambda X, Y: shapes.append((len(X), len(Y))) or real(X, Y))
    monkeypatch.setitem(graph.TILE_ENTRIES, "cpu", 8 * 64)
    assert target_rows(unit_rows(7, 64, 8), slice(0, 4), **options("obdsd"), memory_gib=1e-9).iterations > 0
    assert max(rows * columns for rows, columns in shapes) == 8 * 64
    shapes.clear()
    target_rows(unit_rows(7, 64, 8), slice(0, 4), **options("obdsd"))
    assert set(shapes) == {(64, 64)}


def test_who_solves():
    for nodes, own, more, solver in (
        (112, 112, {}, "cholesky"), (112, 112, {"solver": "cg"}, "cg"), (4096, 64, {}, "cg"),
        (32768, 32768, {}, "cg"), (32768, 32768, {"memory_gib": 20}, "cholesky"),
    ):  # fmt: skip
        assert solvers.choose_solver(nodes, own, Diffusion(**more)) == solver
    with pytest.raises(InputError, match=r"solver=cholesky over 32768 images needs more than .*memory_gib=2"):
        solvers.choose_solver(32768, 512, Diffusion(solver="cholesky"))


@pytest.mark.parametrize("target", ["obdsd", "obdsd_symmetric"])
@pytest.mark.parametrize("mask", [False, True])
def test_a_memory_equals_the_oracle_over_all_nodes(target, mask):
    T_BD, memory_MD = MANIFOLDS["tight"], unit_rows(8, 9, D, 0.3)
    chosen = options(target, 0.1, 0.05, 0.9, mask)
    everything = oracle.target(torch.cat([T_BD, memory_MD]).numpy(), **chosen)[:B, :B]
    mass = everything.sum(1)
    for rows in (ALL, slice(4, 8)):
        solve = target_rows(T_BD, rows, memory_MD, **chosen)
        assert l1(solve.target_bB, (everything / mass[:, None])[rows]) < 1e-8
        np.testing.assert_allclose(solve.dropped_b.numpy(), 1 - mass[rows], atol=1e-9)
    assert (1 - mass).min() > 0.05
    without = target_rows(T_BD, ALL, **chosen)
    assert without.dropped_b is None
    assert l1(without.target_bB, everything / mass[:, None]) > 1e-3
    assert torch.equal(target_rows(T_BD, ALL, memory_MD[:0], **chosen).target_bB, without.target_bB)


def test_a_row_whose_mass_all_lies_in_the_memory_keeps_its_own_distribution():
    # The memory holds copies of row 0; without its own entry all its mass goes there.
    T_BD, chosen = MANIFOLDS["ordinary"], options("obdsd_symmetric", 0.005, 1.0, 0.1, mask=True)
    solve = target_rows(T_BD, ALL, T_BD[:1].repeat(4, 1), **chosen)
    assert solve.dropped_b[0] > 0.999
    psd = target_rows(T_BD, ALL, **options("psd", 0.005, mask=True)).target_bB
    assert torch.equal(solve.target_bB[0], psd[0])
    assert solve.target_bB.isfinite().all()


@pytest.mark.parametrize("target", TARGETS)
def test_half_precision_is_widened_and_autocast_has_no_say(target):
    T_BD, chosen = MANIFOLDS["tight"].bfloat16().requires_grad_(), options(target, 0.1, 0.05, 0.5)
    expected = oracle.target(T_BD.detach().double().numpy(), **chosen)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = target_rows(T_BD, ALL, **chosen).target_bB
        wide = target_rows(T_BD.float(), ALL, **chosen).target_bB
    assert inside.dtype == torch.float32
    assert not inside.requires_grad  # nothing of it reaches the teacher
    assert torch.equal(inside, wide)
    assert l1(inside, expected) < 1e-4


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="B > 1"):
        target_rows(torch.ones(1, D), slice(0, 1), **options("psd"))
    with pytest.raises(InputError, match="rows 8 to 13"):
        target_rows(torch.ones(B, D), slice(8, 13), **options("psd"))


def half_uniform(T_BD: torch.Tensor, rows: slice, diffusion: Diffusion) -> torch.Tensor:
    """A target of somebody else's: between psd and uniform."""
    psd_bB = manifold.target_rows(T_BD, rows, Diffusion("psd", diffusion.temperature)).target_bB
    return (psd_bB + 1 / len(T_BD)) / 2


def test_a_target_can_be_a_function_by_its_import_path():
    T_BD, rows = unit_rows(0), slice(2, 6)
    path = f"{__name__}:half_uniform"
    found = manifold.target_rows(T_BD, rows, Diffusion(path, 0.2)).target_bB
    assert torch.equal(found, half_uniform(T_BD, rows, Diffusion("psd", 0.2)))
    with pytest.raises(InputError, match=r"distillation\.target=nowhere:f cannot be imported"):
        manifold.target_rows(T_BD, rows, Diffusion("nowhere:f"))


@pytest.mark.parametrize("symmetric", [False, True])
def test_diffusion_targets_are_those_of_the_objective(symmetric):
    T_BD, chosen = unit_rows(0), {"temperature": 0.2, "transition_temperature": 0.3, "omega": 0.7}
    expected = oracle.target(T_BD.numpy(), target="obdsd_symmetric" if symmetric else "obdsd", **chosen)
    assert l1(diffusion_targets(T_BD, symmetric=symmetric, **chosen), expected) < 1e-9
    assert l1(diffusion_targets(T_BD, slice(3, 5), symmetric=symmetric, **chosen), expected[3:5]) < 1e-9
    with pytest.raises(InputError, match="step"):
        diffusion_targets(T_BD, slice(0, 6, 2))
