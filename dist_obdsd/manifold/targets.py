"""The targets: distributions over the batch, by the teacher's similarities.

Every rank computes the target of its own rows only, from the teacher's embeddings of the whole batch.

Legend: b own rows, B rows of the batch, n >= B nodes, D embedding dimension; S = T T^T; e_i is a unit vector.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from dist_obdsd.config.registry import TARGETS, import_object
from dist_obdsd.errors import InputError, RunError
from dist_obdsd.manifold import solvers
from dist_obdsd.manifold.diffusion import Diffusion
from dist_obdsd.manifold.graph import Graph, WalkGraph, softmax
from dist_obdsd.manifold.similarity import similarity, without_autocast
from dist_obdsd.transfer import AsyncHostCopy

FLOAT64_TOLERANCE = 1e-10
"""Largest error of a row for float64 embeddings."""
LEAST_MASS = 1e-3
"""Share of a row's mass that must be left in the batch's columns, since dividing by it multiplies errors."""
PART_ENTRIES = 2**26
"""Entries of one part of the own rows: the solver's state is some ten matrices of this size, 256 MiB each."""


class Target:
    """A distribution over the batch for each row, by a graph or by ``rows``."""

    needs_teacher: ClassVar[bool] = True
    graph: ClassVar[type[Graph] | None] = None
    """The graph that the target is diffused on."""

    @staticmethod
    def rows(T_BD: torch.Tensor, rows: slice, diffusion: Diffusion) -> torch.Tensor:
        """Compute the own rows [b, B] of a target that is not diffused."""
        raise NotImplementedError


class Uniform(Target):
    """1 / B everywhere: a control that needs no teacher."""

    needs_teacher = False

    @staticmethod
    def rows(T_BD: torch.Tensor, rows: slice, diffusion: Diffusion) -> torch.Tensor:
        dtype = torch.promote_types(T_BD.dtype, torch.float32)
        return torch.full((rows.stop - rows.start, len(T_BD)), 1 / len(T_BD), dtype=dtype, device=T_BD.device)


class PSD(Target):
    """P = softmax(S / temperature), diagonal included."""

    @staticmethod
    def rows(T_BD: torch.Tensor, rows: slice, diffusion: Diffusion) -> torch.Tensor:
        S_bB = similarity(T_BD[rows], T_BD)
        return softmax(S_bB, diffusion.temperature, rows.start, diffusion.mask_self)


class OBDSD(Target):
    """(1 - omega) (I - omega A)^-1 P, where A is a random walk between the images."""

    graph = WalkGraph


class SymmetricOBDSD(Target):
    """softmax((1 - omega) (I - omega A)^-1 S / temperature) with a symmetric A."""

    graph = Graph


class OwnTarget(Target):
    """A function of yours: (T_BD, rows, diffusion) -> [b, B]."""

    def __init__(self, *, path: str) -> None:
        self.rows = import_object(path, TARGETS.setting)  # type: ignore[method-assign]


@dataclass(frozen=True)
class DiffusionTarget:
    """The target of the own rows, with a bound on its error."""

    target_bB: torch.Tensor
    """Rows that sum to 1, in float32 or, for float64 embeddings, float64. No gradient."""
    error_b: torch.Tensor
    """Bound on each row's L1 error, from the residual of its linear system; 0 where nothing is solved."""
    iterations: int = 0
    """Iterations of the series or the iterative solver; 0 where Cholesky did, or nothing is solved."""
    dropped_b: torch.Tensor | None = None
    """Each row's mass at nodes outside the batch, which was dropped; None where there are none."""


@dataclass
class QueuePlan:
    """Plan of ``start_async``: what was enough in earlier steps of the epoch."""

    products: int | None = None
    """Of Neumann's series; None tries as many as may be worth it."""
    rejected: bool = False
    """Whether the series was not enough, so that a solver is queued."""
    corrections: int = 0
    """The most that a solve took which the host looked at."""
    iterations: int | None = None
    """The most of conjugate gradients in one of its corrections."""

    def learn(self, solve: solvers.Inverse) -> None:
        """Queue as much as this solve took, from the next step on."""
        self.corrections = max(self.corrections, solve.corrections)
        self.iterations = max(self.iterations or 0, solve.longest)


@dataclass(frozen=True)
class PendingTarget:
    """A target that is queued on the device and whose error the host has not read yet."""

    plan: QueuePlan
    graph: Graph | None
    """The graph where it is small enough to be kept for another solve."""
    goal: float
    """The result is accepted if its largest error is at most this."""
    result: DiffusionTarget
    worst: AsyncHostCopy
    """The largest error; of a series of unknown length, that after each product."""

    def read(self) -> DiffusionTarget | None:
        """Return the result if it is accurate enough, and learn for the next step."""
        errors, plan = self.worst.read(), self.plan
        if errors[-1] <= self.goal:
            if len(errors) > 1:  # one more than this batch needed, as the next one may need it
                enough = next(taken for taken, error in enumerate(errors, 1) if error <= self.goal)
                plan.products = min(enough + 1, len(errors))
            return self.result
        if errors[-1] == errors[-1]:  # NaN says nothing about the series
            plan.rejected, plan.products = plan.rejected or self.result.iterations == solvers.FIXED_STEPS, None
        return None


def diffusion_targets(
    teacher_BD: torch.Tensor, rows: slice | None = None, *, temperature: float = 0.1,
    transition_temperature: float = 0.05, omega: float = 0.5, symmetric: bool = False, neighbours: int | None = None,
    tolerance: float = 1e-4,
) -> torch.Tensor:  # fmt: skip
    """Compute soft targets by a diffusion over a batch (arXiv 2211.07566, OBDP).

    >>> targets = diffusion_targets(embeddings, omega=0.9)  # [B, B], rows sum to 1

    target = (1 - omega) (I - omega A)^-1 P with S = T T^T, P = softmax(S / temperature) and
    A = softmax(S / transition_temperature) without its diagonal. The symmetric form is
    softmax((1 - omega) (I - omega A)^-1 S / temperature) with A = D^-1/2 max(S, 0) D^-1/2.

    Args:
        teacher_BD: unit rows [B, D] of the whole batch, B at least 2.
        rows: the rows whose targets are wanted; None: all. A rank asks for its own.
        temperature: of the start distribution P.
        transition_temperature: of the random walk A.
        omega: how far the diffusion goes, from 0 to below 1.
        symmetric: take the published form instead of the released one.
        neighbours: let the diffusion run only along edges to the k nearest; None: to all.
        tolerance: largest L1 error of a row.

    Returns:
        [b, B] without gradient, float32, or float64 for float64 rows.

    Raises:
        InputError: shapes, rows or a number do not fit.
        RunError: no solve is accurate enough.
    """
    if rows is not None and rows.step not in (None, 1):
        raise InputError(f"rows is {rows}; give a slice without a step")
    start, stop, _ = (rows or slice(None)).indices(len(teacher_BD))
    name = "obdsd_symmetric" if symmetric else "obdsd"
    diffusion = Diffusion(name, temperature, transition_temperature, omega, neighbours=neighbours, tolerance=tolerance)
    return target_rows(teacher_BD, slice(start, stop), diffusion).target_bB


@torch.no_grad()
def start_async(
    T_BD: torch.Tensor, rows: slice, diffusion: Diffusion, memory_MD: torch.Tensor | None = None,
    plan: QueuePlan | None = None,
) -> PendingTarget | None:  # fmt: skip
    """Queue what is mostly enough of a diffusion, before the student's forward pass.

    ``target_rows`` reads the error, when the device has other work. None where the matrices are not kept whole, or the
    own rows would be solved in parts.
    """
    plan, T_nD, b = plan or QueuePlan(), _nodes(T_BD, memory_MD), rows.stop - rows.start
    dtype = torch.promote_types(T_nD.dtype, torch.float32)
    if b * len(T_nD) > PART_ENTRIES or not diffusion.fits(len(T_nD), dtype.itemsize, T_nD.device):
        return None
    with without_autocast(T_BD.device):
        graph, goal = _graph(T_nD, diffusion), _goal(T_nD, diffusion)
        if diffusion.solver == "auto" and not plan.rejected:
            products = plan.products or solvers.FIXED_STEPS
            inverse, worst = solvers.neumann_fixed_steps(graph, rows, products, every=plan.products is None)
            goal = solvers.neumann_goal(graph.T_nD.dtype, diffusion.omega, goal)
        else:
            solver = solvers.choose_solver(graph.n, b, diffusion, dtype.itemsize, T_nD.device)
            solve = solvers.Solve(graph, rows, solver, goal, plan.iterations or solvers.FIXED_ITERATIONS)
            for _ in range(plan.corrections):
                solve.correct()
            inverse, worst = solve.inverse, solve.inverse.error_b.max()[None]
            del solve  # and N with it
        result = DiffusionTarget(graph.target(inverse.Y_bn, rows), inverse.error_b, inverse.iterations)
        kept = graph if graph.n**2 <= PART_ENTRIES else None
        return PendingTarget(plan, kept, goal, result, AsyncHostCopy(worst))


@torch.no_grad()
def target_rows(
    T_BD: torch.Tensor, rows: slice, diffusion: Diffusion, memory_MD: torch.Tensor | None = None,
    pending: PendingTarget | None = None,
) -> DiffusionTarget:  # fmt: skip
    """Compute the target of this rank's rows (arXiv 2211.07566, PSD and OBDP).

    With a memory, the diffusion runs over the batch and the memory, and the target is restricted to the batch's
    columns. The solve is accepted by its residual, which bounds the target's L1 error. Where float32 cannot reach it,
    it is done again in float64. NaN or infinite embeddings give NaN targets, which the caller's finite check sees.

    Args:
        T_BD: the teacher's unit rows of the whole batch, B of at least 2. ``uniform`` reads only its shape.
        rows: this rank's rows, with explicit start and stop.
        memory_MD: unit rows of further images by the same teacher, for the diffused targets.
        pending: what ``start_async`` returned for the same arguments.

    Raises:
        InputError: for a batch of fewer than two rows, or rows outside it.
        RunError: if no solve is accurate enough, with the error reached.
    """
    B = T_BD.shape[0]
    if T_BD.dim() != 2 or B < 2:
        raise InputError(f"the teacher's embeddings have shape {tuple(T_BD.shape)}; a target needs (B, D) with B > 1")
    if not 0 <= rows.start < rows.stop <= B:
        raise InputError(f"rows {rows.start} to {rows.stop} do not lie in the batch of {B}")
    target: type[Target] = TARGETS.load(diffusion.target)
    with without_autocast(T_BD.device):
        if target.graph is None:
            target_bB = target.rows(T_BD, rows, diffusion)
            return DiffusionTarget(target_bB, target_bB.new_zeros(target_bB.shape[0]))
        T_nD = _nodes(T_BD, memory_MD)
        result = (pending and pending.read()) or _diffused(T_nD, rows, diffusion, pending)
        return result if len(T_nD) == B else _within_batch(result, T_BD, rows, diffusion)


def _nodes(T_BD: torch.Tensor, memory_MD: torch.Tensor | None) -> torch.Tensor:
    return T_BD if memory_MD is None or not len(memory_MD) else torch.cat([T_BD, memory_MD])


def _graph(T_nD: torch.Tensor, diffusion: Diffusion) -> Graph:
    graph: Graph = TARGETS.load(diffusion.target).graph(T_nD, diffusion)
    return graph


def _goal(T_nD: torch.Tensor, diffusion: Diffusion) -> float:
    return min(diffusion.tolerance, FLOAT64_TOLERANCE) if T_nD.dtype == torch.float64 else diffusion.tolerance


def _diffused(T_nD: torch.Tensor, rows: slice, diffusion: Diffusion, pending: PendingTarget | None) -> DiffusionTarget:
    """Solve [b, n] in the embeddings' precision; if that fails, in float64."""
    graph, goal = (pending and pending.graph) or _graph(T_nD, diffusion), _goal(T_nD, diffusion)
    dtype = graph.T_nD.dtype
    solver = solvers.choose_solver(graph.n, rows.stop - rows.start, diffusion, dtype.itemsize, T_nD.device)
    result, error = _solve(graph, rows, solver, goal, pending.plan if pending else None)
    # NaN compares false, so a failed solve is not accepted either.
    if error <= goal or not bool(T_nD.isfinite().all()):
        return result
    if dtype != torch.float64:
        solver = "cholesky" if diffusion.fits(len(T_nD), 8, T_nD.device) else "cg"
        result, error = _solve(_graph(T_nD.double(), diffusion), rows, solver, diffusion.tolerance)
        result = DiffusionTarget(result.target_bB.to(dtype), result.error_b.to(dtype), result.iterations)
    if not error <= diffusion.tolerance:
        raise RunError(
            f"the {diffusion.target} diffusion over {len(T_nD)} images reached an error of {error:.1e} per row where "
            f"distillation.tolerance={diffusion.tolerance:g} is needed; lower distillation.omega or raise the "
            f"temperatures"
        )
    return result


def _solve(
    graph: Graph, rows: slice, solver: str, tolerance: float, plan: QueuePlan | None = None
) -> tuple[DiffusionTarget, float]:
    """Solve for own rows, some at a time; return the target and its largest error."""
    height, parts, targets = max(PART_ENTRIES // graph.n, 1), [], []
    for start in range(rows.start, rows.stop, height):
        part = slice(start, min(start + height, rows.stop))
        # With a plan a series was queued, now or earlier in the epoch, and did not do.
        series = graph.diffusion.solver == "auto" and plan is None
        found = solvers.neumann_rows(graph, part, tolerance) if series else None
        found = found or solvers.solve_rows(graph, part, solver, tolerance)
        if plan is not None:
            plan.learn(found)
        parts.append(found)
        targets.append(graph.target(found.Y_bn, part))
    error_b, iterations = torch.cat([part.error_b for part in parts]), max(part.iterations for part in parts)
    worst = float(np.max([part.worst for part in parts]))  # NaN if any is
    return DiffusionTarget(torch.cat(targets), error_b, iterations), worst


def _within_batch(result: DiffusionTarget, T_BD: torch.Tensor, rows: slice, diffusion: Diffusion) -> DiffusionTarget:
    """Restrict the target to the batch's columns; rows without mass there are P_i."""
    target_bB = result.target_bB[:, : T_BD.shape[0]]
    left_b = target_bB.sum(1)
    lost_b = left_b < LEAST_MASS
    target_bB = torch.where(lost_b[:, None], PSD.rows(T_BD, rows, diffusion), target_bB / left_b[:, None])
    error_b = (result.error_b / left_b).masked_fill(lost_b, 0)
    return DiffusionTarget(target_bB, error_b, result.iterations, 1 - left_b)
