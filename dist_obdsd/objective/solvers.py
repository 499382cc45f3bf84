"""Rows of (I - omega A)^-1 for this rank's own rows of the batch manifold.

A corrector solves the symmetric system I - omega N, with all rows by Cholesky or with the own rows by conjugate
gradients; what counts is the residual in A's own coordinates, from which the next correction starts. Where corrections
stall, Neumann's series can go on in those coordinates: every step shrinks the residual by omega.

Legend: n nodes, b own rows; rows of b x n matrices are systems of their own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dist_obdsd.objective.graph import Graph, sum_over_tiles

CORRECTIONS = 8
"""At most; ordinary batches need one, outliers at sharp temperatures two or three."""
CG_ITERATIONS = 200
"""At most in one correction."""
NEUMANN_ITERATIONS = 2000
"""At most; an omega of 0.99 needs 920 to shrink a residual by 1e-4."""

Corrector = Callable[[torch.Tensor], tuple[torch.Tensor, int]]
"""From right-hand sides [b, n] in N's coordinates to solutions [b, n] and the iterations taken."""


@dataclass(frozen=True)
class Inverse:
    Y_bn: torch.Tensor
    """Rows y_i with y_i (I - omega A) = e_i."""
    error_b: torch.Tensor
    """Bound on each row's L1 error of the target."""
    iterations: int
    """Products with an n x n matrix spent on iterating: of conjugate gradients and of Neumann's series."""


def solve_rows(graph: Graph, rows: slice, solver: str, tolerance: float, neumann: bool) -> Inverse:
    """Rows [b, n] of (I - omega A)^-1, as accurate as ``tolerance`` where that can be reached.

    Args:
        rows: the own rows.
        solver: cholesky or cg.
        tolerance: of ``Inverse.error_b``. Whether it was reached is for the caller to see there; NaN embeddings give
            NaN errors.
        neumann: go on with Neumann's series if the solver's corrections do not reach it.
    """
    omega = graph.settings.omega
    back_bn = graph.back(rows)
    correct = cholesky(graph) if solver == "cholesky" else conjugate_gradients(graph, back_bn, tolerance / 4)

    def residual(Y_bn: torch.Tensor) -> torch.Tensor:
        """e_i - y_i (I - omega A)."""
        R_bn = sum_over_tiles(graph.tiles, Y_bn, graph.transition).mul_(omega).sub_(Y_bn)
        R_bn.diagonal(offset=rows.start).add_(1)
        return R_bn

    T_nD = graph.T_nD
    R_bn = torch.zeros(rows.stop - rows.start, graph.n, dtype=T_nD.dtype, device=T_nD.device)
    R_bn.diagonal(offset=rows.start).fill_(1)
    Y_bn, worst, iterations = torch.zeros_like(R_bn), float("inf"), 0
    for _ in range(CORRECTIONS):
        correction_bn, taken = correct(R_bn if back_bn is None else R_bn / back_bn)
        if back_bn is not None:
            correction_bn = correction_bn * back_bn
        # Clamped, as the exact y is not negative and a rounding error below 0 would have no logarithm.
        Y_bn = (Y_bn + correction_bn).clamp_min_(0)
        R_bn = residual(Y_bn)
        error_b = graph.error(R_bn)
        iterations += taken
        before, worst = worst, float(error_b.max())  # the host waits here for the device
        if not tolerance < worst < before / 2:  # reached, stalled or NaN
            break
    for _ in range(NEUMANN_ITERATIONS if neumann else 0):
        if not worst > tolerance:
            break
        Y_bn = (Y_bn + R_bn).clamp_min_(0)
        R_bn = residual(Y_bn)
        error_b = graph.error(R_bn)
        iterations += 1
        before, worst = worst, float(error_b.max())
        if worst >= before:  # rounding is all that is left
            break
    return Inverse(Y_bn, error_b, iterations)


def cholesky(graph: Graph) -> Corrector:
    """All of I - omega N is factored once: n^3 / 3 operations and, for each correction, 2 b n^2."""
    everything = slice(0, graph.n)
    M_nn = graph.symmetric(everything).mul_(-graph.settings.omega)
    M_nn.diagonal().add_(1)
    # A failed factorisation shows in the residual, without a wait here.
    factor_nn, _ = torch.linalg.cholesky_ex(M_nn)
    return lambda C_bn: (torch.cholesky_solve(C_bn.T, factor_nn).T, 0)


def conjugate_gradients(graph: Graph, back_bn: torch.Tensor | None, tolerance: float) -> Corrector:
    """One run for each own row: 2 b n^2 operations an iteration, and n x n matrices only a tile at a time.

    The part along N's known leading eigenvector u, of eigenvalue 1, is solved directly, (c.u) / (1 - omega) u, and kept
    out of the iteration, which then sees only the rest of the spectrum (deflation).

    Args:
        tolerance: of the error that the residual stands for in A's coordinates. Below some 1e-6 of the right-hand side
            float32 has nothing more to give, and the next correction takes over.
    """
    u_n, omega = graph.leading_n, graph.settings.omega
    # One tile is the whole matrix: made once, not in every iteration.
    kept = [graph.symmetric(graph.tiles[0])] if len(graph.tiles) == 1 else None
    floor = 8 * torch.finfo(u_n.dtype).eps

    def times_N(X_bn: torch.Tensor) -> torch.Tensor:
        return X_bn @ kept[0] if kept is not None else sum_over_tiles(graph.tiles, X_bn, graph.symmetric)

    def without_u(X_bn: torch.Tensor) -> torch.Tensor:
        return X_bn.addr_(X_bn @ u_n, u_n, alpha=-1)

    def correct(C_bn: torch.Tensor) -> tuple[torch.Tensor, int]:
        # Scaled to a largest entry of 1, since squares of what outliers leave would underflow.
        size_b = C_bn.abs().amax(1).clamp_min(torch.finfo(C_bn.dtype).tiny)
        C_bn = C_bn / size_b[:, None]
        X_bn = torch.outer(C_bn @ u_n / (1 - omega), u_n)
        R_bn = without_u(C_bn.clone())
        D_bn = R_bn.clone()
        rr_b = R_bn.square().sum(1)
        enough_b = C_bn.square().sum(1) * floor**2
        iterations = 0
        while iterations < CG_ITERATIONS:
            error_b = size_b * graph.error(R_bn if back_bn is None else R_bn * back_bn)
            if bool(((error_b <= tolerance) | ~(rr_b > enough_b)).all()):
                break
            Q_bn = D_bn.add(times_N(D_bn), alpha=-omega)
            step_b = rr_b / (D_bn * Q_bn).sum(1).clamp_min(torch.finfo(rr_b.dtype).tiny)
            X_bn.addcmul_(step_b[:, None], D_bn)
            R_bn = without_u(R_bn.addcmul_(step_b[:, None], Q_bn, value=-1))
            before_b, rr_b = rr_b, R_bn.square().sum(1)
            D_bn.mul_((rr_b / before_b.clamp_min(torch.finfo(rr_b.dtype).tiny))[:, None]).add_(R_bn)
            iterations += 1
        return X_bn.mul_(size_b[:, None]), iterations

    return correct
