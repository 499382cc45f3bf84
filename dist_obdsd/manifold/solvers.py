"""Rows of (I - omega A)^-1 for this rank's own rows of the batch manifold.

A corrector solves the symmetric system I - omega N, with all rows by Cholesky or with the own rows by conjugate
gradients. The residual in A's own coordinates decides; the next correction starts from it. At the usual temperatures a
walk soon forgets where it began, and a few terms of Neumann's series are enough, without N.

Legend: n nodes, b own rows; rows of b x n matrices are systems of their own.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dist_obdsd.errors import InputError
from dist_obdsd.manifold.diffusion import Diffusion
from dist_obdsd.manifold.graph import Graph, times_matrix

CORRECTIONS = 20
"""Most corrections; ordinary batches need one, outliers at sharp temperatures two or three."""
CG_ITERATIONS = 200
"""Most iterations in one correction."""
NEUMANN_STEPS = 3
"""Products with A after which an inverse by Cholesky would have been cheaper."""
FIXED_STEPS, FIXED_ITERATIONS = 8, 10
"""Products with A, and iterations of conjugate gradients, queued before it is known how many a batch needs."""
GPU_CHOLESKY = 2048
"""Nodes up to which a GPU factors the whole matrix: an estimate, 1 ms or so, beside 15 kernels an iteration."""
CPU = torch.device("cpu")
ROUNDING = 16
"""Residual of a unit row, in epsilons of its type, at which every solver has only rounding errors left."""


def choose_solver(
    nodes: int, own_rows: int, diffusion: Diffusion, bytes_per_entry: int = 4, device: torch.device = CPU
) -> str:
    """Choose cholesky or cg, by the settings or, for ``auto``, by speed and memory.

    Raises:
        InputError: cholesky is asked for and does not fit ``memory_gib``.
    """
    fit = diffusion.fits(nodes, bytes_per_entry, device)
    if diffusion.solver == "cholesky" and not fit:
        raise InputError(
            f"distillation.solver=cholesky over {nodes} images needs more than distillation.memory_gib="
            f"{diffusion.gib(device):g}; raise that, or set distillation.solver=cg"
        )
    if diffusion.solver != "auto":
        return diffusion.solver
    # Where conjugate gradients overtake was measured on a CPU.
    enough = max(6 * own_rows, 0 if device.type == "cpu" else GPU_CHOLESKY)
    return "cholesky" if fit and nodes <= enough else "cg"


@dataclass
class Inverse:
    """Rows y_i [b, n] with y_i (I - omega A) = e_i, and what they took."""

    Y_bn: torch.Tensor
    error_b: torch.Tensor
    """Bound on each row's L1 error of the target."""
    iterations: int = 0
    """Products with an n x n matrix spent on iterating."""
    corrections: int = 0
    longest: int = 0
    """Most iterations of conjugate gradients in one correction."""
    worst: float = math.nan
    """The largest error; NaN where the host did not look."""


class Solve:
    """An ``inverse`` that corrections make better."""

    def __init__(self, graph: Graph, rows: slice, solver: str, tolerance: float, iterations: int | None = None) -> None:
        """Solve for the own rows' unit vectors, as well as ``tolerance`` needs."""
        self._graph, self._rows, self._to_walk_bn = graph, rows, graph.to_walk_coordinates(rows)
        if solver == "cholesky":
            self._corrector: Cholesky | ConjugateGradients = Cholesky(graph)
        else:
            self._corrector = ConjugateGradients(graph, self._to_walk_bn, tolerance / 4, iterations)
        solved_bn, taken = self._corrector.unit_rows(rows)  # which are the same in both coordinates
        Y_bn = self._in_walk(solved_bn).clamp_min_(0)
        self.inverse = Inverse(Y_bn, self._error(Y_bn), taken, 0, taken)

    def correct(self) -> None:
        """Solve for what is left of the residual."""
        R_bn = self._R_bn if self._to_walk_bn is None else self._R_bn / self._to_walk_bn
        # Scaled to a largest entry of 1, since squares of what outliers leave would underflow.
        size_b1 = R_bn.abs().amax(1, keepdim=True).clamp_min(torch.finfo(R_bn.dtype).tiny)
        solved_bn, taken = self._corrector(R_bn / size_b1, size_b1)
        found = self.inverse
        # Clamped, as the exact y is not negative and a rounding error below 0 would have no logarithm.
        found.Y_bn.add_(self._in_walk(solved_bn.mul_(size_b1))).clamp_min_(0)
        found.error_b, found.corrections = self._error(found.Y_bn), found.corrections + 1
        found.iterations, found.longest = found.iterations + taken, max(found.longest, taken)

    def _in_walk(self, solved_bn: torch.Tensor) -> torch.Tensor:
        return solved_bn if self._to_walk_bn is None else solved_bn.mul_(self._to_walk_bn)

    def _error(self, Y_bn: torch.Tensor) -> torch.Tensor:
        """Bound the error [b] by the residual e_i - y_i (I - omega A), which is kept."""
        graph = self._graph
        self._R_bn = times_matrix(graph.tiles, Y_bn, graph.transition, alpha=graph.diffusion.omega, beta=-1)
        self._R_bn.diagonal(offset=self._rows.start).add_(1)
        return graph.error(self._R_bn)


def solve_rows(graph: Graph, rows: slice, solver: str, tolerance: float) -> Inverse:
    """Compute rows [b, n] of (I - omega A)^-1, to ``tolerance`` if possible."""
    solve = Solve(graph, rows, solver, tolerance)
    found, before = solve.inverse, math.inf
    found.worst = float(found.error_b.max())  # the host waits here for the device
    while found.corrections < CORRECTIONS and tolerance < found.worst < before / 2:  # not reached, stalled or NaN
        solve.correct()
        before, found.worst = found.worst, float(found.error_b.max())
    return found


def neumann_rows(graph: Graph, rows: slice, tolerance: float) -> Inverse | None:
    """Compute rows of (I - omega A)^-1 by Neumann's series; None where it is long.

        y' = e_i + omega y A  differs from y by y's residual, and its own residual is omega times that one times A

    As A's rows sum to 1, or its eigenvalues are at most 1, that residual is at most omega times as large, which takes
    no further product to know.
    """
    goal, before = neumann_goal(graph.T_nD.dtype, graph.diffusion.omega, tolerance), 2 * graph.diffusion.omega
    for taken, (Y_bn, before_bn) in enumerate(_series(graph, rows, NEUMANN_STEPS), 1):
        error_b = _bound(graph, Y_bn, before_bn)
        worst = float(error_b.max())  # the host waits here for the device
        if worst <= goal:
            return Inverse(Y_bn, error_b, taken, worst=worst)
        # Written so that NaN, and with omega 0 anything that is left, is too slow.
        if not (before and worst * (worst / before) ** (NEUMANN_STEPS - taken) <= goal):
            return None
        before = worst
    return None


def neumann_fixed_steps(graph: Graph, rows: slice, products: int, every: bool) -> tuple[Inverse, torch.Tensor]:
    """Compute the same rows, and their largest bound after the last or every product."""
    largest = []
    for taken, (Y_bn, before_bn) in enumerate(_series(graph, rows, products), 1):
        if every or taken == products:
            error_b = _bound(graph, Y_bn, before_bn)
            largest.append(error_b.max())
    return Inverse(Y_bn, error_b, products), torch.stack(largest)


def _series(graph: Graph, rows: slice, products: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield ever better rows [b, n], each with those before."""
    if not graph.whole:
        return
    A_nn = graph.transition(slice(0, graph.n))
    units_bn, Y_bn = unit_rows(rows, A_nn), graph.initial_guess(rows, A_nn)
    for _ in range(products):
        before_bn, Y_bn = Y_bn, torch.addmm(units_bn, Y_bn, A_nn, alpha=graph.diffusion.omega)
        yield Y_bn, before_bn


def _bound(graph: Graph, Y_bn: torch.Tensor, before_bn: torch.Tensor) -> torch.Tensor:
    return graph.error(before_bn.sub_(Y_bn)) * graph.diffusion.omega


def neumann_goal(dtype: torch.dtype, omega: float, tolerance: float) -> float:
    """Compute the error that the series must reach, whichever rows a rank has."""
    return min(tolerance, ROUNDING * torch.finfo(dtype).eps / (1 - omega))


class Cholesky:
    """A Cholesky factor of I - omega N: n^3 / 3 operations, and 2 b n^2 for b rows."""

    def __init__(self, graph: Graph) -> None:
        M_nn = graph.symmetric(slice(0, graph.n)).mul_(-graph.diffusion.omega)
        M_nn.diagonal().add_(1)
        # A failed factorisation shows in the residual, without a wait here.
        self._factor_nn, _ = torch.linalg.cholesky_ex(M_nn)

    def unit_rows(self, rows: slice) -> tuple[torch.Tensor, int]:
        """Solve for the unit vectors of the own rows."""
        n = len(self._factor_nn)
        if 3 * (rows.stop - rows.start) > n:
            return torch.cholesky_inverse(self._factor_nn)[rows], 0
        return self(unit_rows(rows, self._factor_nn))

    def __call__(self, C_bn: torch.Tensor, size_b1: torch.Tensor | None = None) -> tuple[torch.Tensor, int]:
        """Solve x (I - omega N) = c for rows c: solutions [b, n], iterations."""
        return torch.cholesky_solve(C_bn.T, self._factor_nn).T, 0


class ConjugateGradients:
    """Conjugate gradients for own rows: 2 b n^2 operations an iteration, by tiles.

    Without a number of iterations the host looks at each one's error in A's coordinates.
    The part along N's known leading eigenvector u, of eigenvalue 1, is solved directly, (c.u) / (1 - omega) u. The
    iteration is left with the rest of the spectrum, N - u u^T (deflation).
    """

    def __init__(
        self, graph: Graph, to_walk_bn: torch.Tensor | None, tolerance: float, iterations: int | None = None
    ) -> None:
        self._graph, self._to_walk_bn, self._tolerance, self._fixed = graph, to_walk_bn, tolerance, iterations
        self._u_n = graph.top_eigenvector_n
        # One tile is the whole matrix: made once, not in every iteration.
        self._N_nn = graph.symmetric(graph.tiles[0]) if len(graph.tiles) == 1 else None
        if self._N_nn is not None:
            self._N_nn.addr_(self._u_n, self._u_n, alpha=-1)

    def unit_rows(self, rows: slice) -> tuple[torch.Tensor, int]:
        return self._solve(unit_rows(rows, self._graph.T_nD), self._u_n[rows], None)

    def __call__(self, C_bn: torch.Tensor, size_b1: torch.Tensor | None = None) -> tuple[torch.Tensor, int]:
        """Solve x (I - omega N) = c for rows c that were divided by ``size_b1``."""
        return self._solve(C_bn, C_bn @ self._u_n, size_b1)

    def _solve(
        self, C_bn: torch.Tensor, along_b: torch.Tensor, size_b1: torch.Tensor | None
    ) -> tuple[torch.Tensor, int]:
        fixed, omega = self._fixed, self._graph.diffusion.omega
        X_bn = torch.addr(C_bn, along_b, self._u_n, beta=0, alpha=1 / (1 - omega))
        D_bn = R_bn = torch.addr(C_bn, along_b, self._u_n, alpha=-1)
        # Where nothing is left, both products of a step are this, and the step is along 0.
        tiny_b11 = C_bn.new_full((len(C_bn), 1, 1), torch.finfo(C_bn.dtype).tiny)
        rr_b1, iterations = _products(R_bn, R_bn, tiny_b11), 0
        if fixed is None:
            enough_b1 = _products(C_bn, C_bn, tiny_b11) * (8 * torch.finfo(C_bn.dtype).eps) ** 2
        while iterations < (CG_ITERATIONS if fixed is None else fixed):
            if fixed is None and self._reached(R_bn, rr_b1 <= enough_b1, size_b1):
                break
            Q_bn = self._times_M(D_bn)
            step_b1 = rr_b1 / _products(D_bn, Q_bn, tiny_b11)
            X_bn.addcmul_(step_b1, D_bn)
            iterations += 1
            if iterations == fixed:  # nobody asks for this residual
                break
            R_bn = torch.addcmul(R_bn, step_b1, Q_bn, value=-1)
            before_b1, rr_b1 = rr_b1, _products(R_bn, R_bn, tiny_b11)
            D_bn = torch.addcmul(R_bn, D_bn, rr_b1 / before_b1)
        return X_bn, iterations

    def _reached(self, R_bn: torch.Tensor, rounding_b1: torch.Tensor, size_b1: torch.Tensor | None) -> bool:
        """Tell whether every row is accurate enough. The host waits here."""
        error_b = self._graph.error(R_bn if self._to_walk_bn is None else R_bn * self._to_walk_bn)
        enough_b = error_b * (1 if size_b1 is None else size_b1[:, 0]) <= self._tolerance
        return bool((enough_b | rounding_b1[:, 0]).all())

    def _times_M(self, X_bn: torch.Tensor) -> torch.Tensor:
        """X (I - omega (N - u u^T))."""
        omega = self._graph.diffusion.omega
        if self._N_nn is not None:
            return torch.addmm(X_bn, X_bn, self._N_nn, alpha=-omega)
        product_bn = times_matrix(self._graph.tiles, X_bn, self._graph.symmetric, alpha=-omega, beta=1)
        return product_bn.addr_(X_bn @ self._u_n, self._u_n, alpha=omega)


def _products(X_bn: torch.Tensor, Y_bn: torch.Tensor, tiny_b11: torch.Tensor) -> torch.Tensor:
    """Multiply row by row [b, 1], in one kernel."""
    return torch.baddbmm(tiny_b11, X_bn[:, None], Y_bn[:, :, None])[:, 0]


def unit_rows(rows: slice, like_nx: torch.Tensor) -> torch.Tensor:
    """Make rows of the identity [b, n]."""
    unit_bn = like_nx.new_zeros(rows.stop - rows.start, len(like_nx))
    unit_bn.diagonal(offset=rows.start).fill_(1)
    return unit_bn
