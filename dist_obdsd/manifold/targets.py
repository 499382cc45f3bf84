"""The targets: which rows of the batch are close to each other, according to the teacher.

Every rank computes the target of its own rows only, from the teacher's embeddings of the whole batch.

Legend: b own rows, B rows of the batch, n >= B nodes, D embedding dimension; S = T T^T; e_i is a unit vector.
"""

from dataclasses import dataclass

import torch

from dist_obdsd.config import Config, DistillationConfig
from dist_obdsd.errors import InputError, RunError
from dist_obdsd.manifold.graph import Graph, SymmetricGraph, WalkGraph, fits, softmax
from dist_obdsd.manifold.similarity import similarity, without_autocast
from dist_obdsd.manifold.solvers import series_goal, series_rows, series_rows_unseen, solve_rows
from dist_obdsd.transfer import AsyncHostCopy

FLOAT64_TOLERANCE = 1e-10
"""What is aimed at for float64 embeddings."""
LEAST_MASS = 1e-3
"""Of a row's mass, what must be left in the batch's columns for it to be used."""
AHEAD_SIZE = 2**33
"""Largest b n^2 of a solve ahead, which takes more products than are needed: beyond it they cost more than a look."""
PART_ENTRIES = 2**26
"""Entries of one part of the own rows: the solver's state is some ten matrices of this size, 256 MiB each."""


@dataclass(frozen=True)
class Solve:
    target_bB: torch.Tensor
    """Rows that sum to 1, in float32 or, for float64 embeddings, float64. No gradient."""
    error_b: torch.Tensor
    """Bound on each row's L1 error, from the residual of its linear system; 0 where nothing is solved."""
    iterations: int = 0
    """Of the series or the iterative solver; 0 where Cholesky did, or nothing is solved."""
    dropped_b: torch.Tensor | None = None
    """Each row's mass at nodes outside the batch, which was dropped; None where there are none."""


@dataclass(frozen=True)
class Ahead:
    """A solve that was queued on the device before anybody looked at it."""

    solve: Solve
    worst: AsyncHostCopy
    """Its largest error."""
    goal: float
    """What that must be to be accepted."""


def solves_ahead(b: int, B: int, config: DistillationConfig) -> bool:
    """Whether ``begin`` is for a target of b own rows in a batch of B."""
    return config.target == "obdsd" and config.solver == "auto" and b * (B + config.memory) ** 2 <= AHEAD_SIZE


@torch.no_grad()
def begin(
    T_BD: torch.Tensor, rows: slice, config: DistillationConfig, memory_MD: torch.Tensor | None = None
) -> Ahead | None:
    """Queue what mostly is the whole diffusion, so that the device has other work when the host asks for its error:
    called before the student's forward pass, with ``target_rows`` after it. None where the matrices are not kept whole.

    Args:
        As of ``target_rows``; of ones for which ``solves_ahead`` holds.
    """
    with without_autocast(T_BD.device):
        T_nD = _nodes(T_BD, memory_MD)
        graph = _graph(T_nD, config)
        inverse = series_rows_unseen(graph, rows)
        if inverse is None:
            return None
        solve = Solve(graph.target(inverse.Y_bn, rows), inverse.error_b, inverse.iterations)
        goal = series_goal(solve.target_bB.dtype, config, _goal(T_nD, config))
        return Ahead(solve, AsyncHostCopy(inverse.error_b.max()[None]), goal)


@torch.no_grad()
def target_rows(
    T_BD: torch.Tensor,
    rows: slice,
    config: DistillationConfig,
    memory_MD: torch.Tensor | None = None,
    ahead: Ahead | None = None,
) -> Solve:
    """The target distribution of this rank's rows (arXiv 2211.07566, PSD and OBDP).

    - ``uniform``: 1/B.
    - ``psd``: P = softmax(S / temperature), diagonal included.
    - ``obdsd``: (1 - omega) (I - omega A)^-1 P, where A = softmax(S / transition_temperature) with the diagonal masked.
    - ``obdsd_symmetric``: softmax((1 - omega) (I - omega A)^-1 S / temperature), where A = D^-1/2 S0 D^-1/2,
      S0 = max(S, 0) with zero diagonal and D its row sums.

    A row without an edge (degree 0) keeps its own P_i. ``mask_self`` takes the diagonal out of P (for
    ``obdsd_symmetric``, out of the last softmax), so that a row's own entry in a psd target is 0; a diffused target may
    still hold mass at its own row, which came back from neighbours. ``neighbours``, ``mutual``, ``clip`` and ``power``
    sharpen S in A alone (Iscen et al., CVPR 2017; Yang et al., AAAI 2019).

    With a memory, the diffusion runs over the batch and the memory; the target is then restricted to the batch's
    columns and its rows are divided by what is left of their mass.

    The solve is accepted by its residual, which bounds the target's L1 error. Where float32 cannot reach it, it is done
    again in float64. NaN or infinite embeddings give NaN targets, which the caller's finite check sees.

    Args:
        T_BD: the teacher's unit rows of the whole batch, B of at least 2. ``uniform`` reads only its shape.
        rows: this rank's rows, with explicit start and stop.
        memory_MD: unit rows of further images by the same teacher, for the diffused targets.
        ahead: what ``begin`` returned for the same arguments.

    Raises:
        InputError: for a batch of fewer than two rows, rows outside it or an unknown target.
        RunError: if no solve is accurate enough, with the error reached.
    """
    B, target = T_BD.shape[0], config.target
    if T_BD.dim() != 2 or B < 2:
        raise InputError(f"the teacher's embeddings have shape {tuple(T_BD.shape)}; a target needs (B, D) with B > 1")
    if not 0 <= rows.start < rows.stop <= B:
        raise InputError(f"rows {rows.start} to {rows.stop} do not lie in the batch of {B}")
    if target == "none":
        raise InputError("target none has no rows; give uniform, psd, obdsd or obdsd_symmetric")
    with without_autocast(T_BD.device):
        if target == "uniform":
            dtype = torch.promote_types(T_BD.dtype, torch.float32)
            return _exact(torch.full((rows.stop - rows.start, B), 1 / B, dtype=dtype, device=T_BD.device))
        if target == "psd":
            S_bB = similarity(T_BD[rows], T_BD)
            return _exact(softmax(S_bB, config.temperature, rows.start, config.mask_self))
        T_nD = _nodes(T_BD, memory_MD)
        if ahead is not None and ahead.worst.read()[0] <= ahead.goal:
            solve = ahead.solve
        else:
            solve = _diffused(T_nD, rows, config)
        return solve if len(T_nD) == B else _within_batch(solve, T_BD, rows, config)


def choose_solver(nodes: int, own_rows: int, config: DistillationConfig, bytes_per_entry: int = 4) -> str:
    """cholesky or cg: what the settings say or, for ``auto``, what is faster and fits where the series does not do.

    Cholesky costs n^3 / 3 + 2 b n^2 operations, conjugate gradients some 3 iterations of 2 b n^2. Where one overtakes
    the other was measured on a CPU.

    Raises:
        InputError: cholesky is asked for and does not fit ``memory_gib``.
    """
    fit = fits(nodes, bytes_per_entry, config)
    if config.solver == "cholesky" and not fit:
        raise InputError(
            f"distillation.solver=cholesky over {nodes} images needs more than distillation.memory_gib="
            f"{config.memory_gib:g}; raise that, or set distillation.solver=cg"
        )
    if config.solver != "auto":
        return config.solver
    return "cholesky" if fit and nodes <= 6 * own_rows else "cg"


def describe(config: Config, world_size: int) -> list[str]:
    """What depends on the sizes of a run, in sentences, before anything runs.

    Raises:
        InputError: as ``choose_solver``.
    """
    B, distillation, lines = config.batch.global_size, config.distillation, []
    own = B // world_size
    if distillation.scope == "rank" and world_size > 1:
        lines.append(f"distillation.scope=rank: {world_size} manifolds of {own} images, so results depend on the ranks")
    if distillation.diffuses:
        nodes = (own if distillation.scope == "rank" else B) + distillation.memory
        solver = choose_solver(nodes, own, distillation, 8 if config.precision == "float64" else 4)
        lines.append(f"diffusion over {nodes} images for {own} rows a rank: {solver}")
    return lines


def _nodes(T_BD: torch.Tensor, memory_MD: torch.Tensor | None) -> torch.Tensor:
    return T_BD if memory_MD is None or not len(memory_MD) else torch.cat([T_BD, memory_MD])


def _graph(T_nD: torch.Tensor, config: DistillationConfig) -> Graph:
    return (WalkGraph if config.target == "obdsd" else SymmetricGraph)(T_nD, config)


def _goal(T_nD: torch.Tensor, config: DistillationConfig) -> float:
    return min(config.tolerance, FLOAT64_TOLERANCE) if T_nD.dtype == torch.float64 else config.tolerance


def _exact(target_bB: torch.Tensor) -> Solve:
    return Solve(target_bB, target_bB.new_zeros(target_bB.shape[0]))


def _diffused(T_nD: torch.Tensor, rows: slice, config: DistillationConfig) -> Solve:
    """Solve in the embeddings' precision; where that is not accurate, in float64 or, too large for it, iterate on.
    [b, n]"""
    precise, dtype = T_nD.dtype == torch.float64, torch.promote_types(T_nD.dtype, torch.float32)
    solver = choose_solver(len(T_nD), rows.stop - rows.start, config, dtype.itemsize)
    goal = _goal(T_nD, config)
    retry = not precise and fits(len(T_nD), 8, config)
    solve = _solve(T_nD, rows, config, solver, goal, neumann=not retry)
    # NaN compares false, so a failed solve is not accepted either.
    if bool(solve.error_b.max() <= goal) or not bool(T_nD.isfinite().all()):
        return solve
    if retry:
        solve = _solve(T_nD.double(), rows, config, "cholesky", config.tolerance, neumann=True)
        solve = Solve(solve.target_bB.to(dtype), solve.error_b.to(dtype), solve.iterations)
    error = float(solve.error_b.max())
    if not error <= config.tolerance:
        raise RunError(
            f"the {config.target} diffusion over {len(T_nD)} images reached an error of {error:.1e} per row where "
            f"distillation.tolerance={config.tolerance:g} is needed; lower distillation.omega or raise the "
            f"temperatures"
        )
    return solve


def _solve(
    T_nD: torch.Tensor, rows: slice, config: DistillationConfig, solver: str, tolerance: float, neumann: bool
) -> Solve:
    graph = _graph(T_nD, config)
    height = max(PART_ENTRIES // graph.n, 1)
    targets, errors, iterations = [], [], 0
    for start in range(rows.start, rows.stop, height):
        part = slice(start, min(start + height, rows.stop))
        inverse = series_rows(graph, part, tolerance) if config.solver == "auto" else None
        if inverse is None:
            inverse = solve_rows(graph, part, solver, tolerance, neumann)
        targets.append(graph.target(inverse.Y_bn, part))
        errors.append(inverse.error_b)
        iterations = max(iterations, inverse.iterations)
    return Solve(torch.cat(targets), torch.cat(errors), iterations)


def _within_batch(solve: Solve, T_BD: torch.Tensor, rows: slice, config: DistillationConfig) -> Solve:
    """The target restricted to the batch's columns. Dividing by the mass that is left multiplies errors alike, so a row
    that has next to nothing left keeps its P_i over the batch, as an isolated one does."""
    target_bB = solve.target_bB[:, : T_BD.shape[0]]
    left_b = target_bB.sum(1)
    lost_b = left_b < LEAST_MASS
    own_bB = softmax(similarity(T_BD[rows], T_BD), config.temperature, rows.start, config.mask_self)
    target_bB = torch.where(lost_b[:, None], own_bB, target_bB / left_b[:, None])
    error_b = (solve.error_b / left_b).masked_fill(lost_b, 0)
    return Solve(target_bB, error_b, solve.iterations, 1 - left_b)
