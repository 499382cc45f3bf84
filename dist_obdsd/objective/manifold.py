"""The batch manifold: which rows of the batch are close to each other, according to the teacher.

Every rank computes the target of its own rows only, from the teacher's embeddings of the whole batch.

Legend: b rows of this rank, B rows of the global batch, D embedding dimension; S = T T^T; e_i is a unit vector.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dist_obdsd.errors import InputError, RunError
from dist_obdsd.objective.terms import similarity

TOLERANCE = 1e-4
"""Largest L1 error of a target row. Float32 reaches 1e-5 at the published settings; a bfloat16 teacher moves a row by
about 1e-2."""
FLOAT64_TOLERANCE = 1e-10
"""The same for embeddings that are float64 themselves, before the fallback is tried."""


@dataclass(frozen=True)
class Solve:
    target_bB: torch.Tensor
    """Rows that sum to 1, in float32 or, for float64 embeddings, float64. No gradient."""
    residual_b: torch.Tensor
    """Bound on each row's L1 error, from the residual of its linear system; 0 where nothing is solved."""


@torch.no_grad()
def target_rows(
    T_BD: torch.Tensor,
    rows: slice,
    *,
    target: str,
    temperature: float,
    transition_temperature: float,
    omega: float,
    mask_self: bool,
) -> Solve:
    """The target distribution of this rank's rows (arXiv 2211.07566, PSD and OBDP).

    - ``uniform``: 1/B.
    - ``psd``: P = softmax(S / temperature), diagonal included.
    - ``obdsd``: (1 - omega) (I - omega A)^-1 P, where A = softmax(S / transition_temperature) with the diagonal masked.
    - ``obdsd_symmetric``: softmax((1 - omega) (I - omega A)^-1 S / temperature), where A = D^-1/2 S0 D^-1/2,
      S0 = max(S, 0) with zero diagonal and D its row sums. A row without neighbours (degree 0) is linked to no other
      one and keeps its own P_i.

    ``mask_self`` takes the diagonal out of P (for ``obdsd_symmetric``, out of the last softmax), so that a row's own
    entry in a psd target is 0. A diffused target may still hold mass at its own row, which came back from neighbours.

    The solve is accepted by its residual, which bounds the target's L1 error; otherwise it is done again in float64 by
    LU. That comparison is the only value that the host reads from the device, and only the two diffused targets need
    it. NaN or infinite embeddings give NaN targets, which the caller's finite check sees.

    Args:
        T_BD: the teacher's unit rows of the whole batch, B of at least 2. ``uniform`` reads only its shape.
        rows: this rank's rows, with explicit start and stop.
        omega: in [0, 1); 0 makes both diffused targets equal to ``psd``.

    Raises:
        InputError: for a batch of fewer than two rows, rows outside it or an unknown target.
        RunError: if no solve is accurate enough, with the error reached.
    """
    B = T_BD.shape[0]
    if T_BD.dim() != 2 or B < 2:
        raise InputError(f"the teacher's embeddings have shape {tuple(T_BD.shape)}; a target needs (B, D) with B > 1")
    if not 0 <= rows.start < rows.stop <= B:
        raise InputError(f"rows {rows.start} to {rows.stop} do not lie in the batch of {B}")
    if target not in ("uniform", "psd", "obdsd", "obdsd_symmetric"):
        raise InputError(f"target {target} has no rows; give uniform, psd, obdsd or obdsd_symmetric")

    def diffuse(S_BB: torch.Tensor, lu: bool) -> Solve:
        if target == "obdsd":
            return _obdsd_rows(S_BB, rows, temperature, transition_temperature, omega, mask_self, lu)
        return _symmetric_rows(S_BB, rows, temperature, omega, mask_self, lu)

    with torch.autocast(T_BD.device.type, enabled=False):
        if target == "uniform":
            dtype = torch.promote_types(T_BD.dtype, torch.float32)
            return _exact(torch.full((rows.stop - rows.start, B), 1 / B, dtype=dtype, device=T_BD.device))
        if target == "psd":
            return _exact(_softmax(similarity(T_BD[rows], T_BD) / temperature, rows.start, mask_self))
        return _accepted(T_BD, target, diffuse)


def _exact(target_bB: torch.Tensor) -> Solve:
    return Solve(target_bB, target_bB.new_zeros(target_bB.shape[0]))


def _accepted(T_BD: torch.Tensor, target: str, diffuse: Callable[[torch.Tensor, bool], Solve]) -> Solve:
    """The Cholesky solve in the embeddings' precision, or the LU solve in float64 where that is not accurate."""
    S_BB = similarity(T_BD, T_BD)
    solve = diffuse(S_BB, False)
    tolerance = FLOAT64_TOLERANCE if S_BB.dtype == torch.float64 else TOLERANCE
    # NaN compares false, so a failed factorisation is not accepted either.
    if bool(solve.residual_b.max() <= tolerance) or not bool(T_BD.isfinite().all()):
        return solve
    T_BD = T_BD.double()
    retry = diffuse(similarity(T_BD, T_BD), True)
    error = float(retry.residual_b.max())
    if not error <= TOLERANCE:
        raise RunError(
            f"the {target} diffusion over {T_BD.shape[0]} rows reached an error of {error:.1e} per row where "
            f"{TOLERANCE:.0e} is needed; lower distillation.omega or raise the temperatures"
        )
    return Solve(retry.target_bB.to(S_BB.dtype), retry.residual_b.to(S_BB.dtype))


def _obdsd_rows(
    S_BB: torch.Tensor,
    rows: slice,
    temperature: float,
    transition_temperature: float,
    omega: float,
    mask_self: bool,
    lu: bool,
) -> Solve:
    """Row i is (1 - omega) y P, where y solves y (I - omega A) = e_i.

    A is a row softmax of a symmetric matrix. With r the log of its row sums, N_ij = exp(S_ij/t - r_i/2 - r_j/2) is
    symmetric and similar to A, so I - omega N is positive definite, and y_ij = w_ij exp((r_j - r_i)/2) with w the rows
    of its inverse. (exp(r/2) alone would overflow at sharp temperatures.) The factor multiplies errors too, so what
    counts is the residual in A's own coordinates: since A's rows sum to 1, and P's do,
    || error of the target ||_1 <= || e_i - y (I - omega A) ||_1.
    """
    P_BB = _softmax(S_BB / temperature, 0, mask_self)
    # Logits reach 1/t = 200, where float32 is coarse. Differences of near ones are exact, so r is kept in two parts,
    # r = m + log s, and the shift by S = 1 keeps the logits of close rows small.
    logits_BB = ((S_BB - 1) / transition_temperature).fill_diagonal_(-torch.inf)
    m_B = logits_BB.amax(1)
    below_BB = logits_BB - m_B[:, None]
    s_B = below_BB.exp().sum(1)
    A_BB = below_BB.exp() / s_B[:, None]
    if lu:
        Y_bB = _lu_rows(A_BB, omega, rows)
    else:
        N_BB = ((below_BB + below_BB.T) / 2).exp() / (s_B[:, None] * s_B).sqrt()
        back_bB = ((m_B - m_B[rows, None]) / 2).exp() * (s_B / s_B[rows, None]).sqrt()
        Y_bB = _cholesky_rows(N_BB, omega, rows) * back_bB
    Y_bB = Y_bB.clamp_min(0)  # true of the exact y; a rounding error below 0 would have no logarithm
    residual_b = _residual_rows(Y_bB, A_BB, omega, rows).abs().sum(1)
    return Solve((1 - omega) * Y_bB @ P_BB, residual_b)


def _symmetric_rows(
    S_BB: torch.Tensor, rows: slice, temperature: float, omega: float, mask_self: bool, lu: bool
) -> Solve:
    """Row i is softmax((1 - omega) w S / temperature), where w solves w (I - omega A) = e_i.

    A's eigenvalues lie in [-1, 1], so an error of w is at most 1/(1 - omega) times its residual in L2, and a logit's
    error at most that times (1 - omega) |S_j| / temperature; softmax does not enlarge it (from max norm to L1).
    """
    S0_BB = S_BB.clamp_min(0).fill_diagonal_(0)
    degree_B = S0_BB.sum(1)
    isolated_B = degree_B == 0
    scale_B = degree_B.masked_fill(isolated_B, 1).rsqrt()
    A_BB = scale_B[:, None] * S0_BB * scale_B
    W_bB = (_lu_rows if lu else _cholesky_rows)(A_BB, omega, rows)
    reach = S_BB.norm(dim=1).max() / temperature
    residual_b = _residual_rows(W_bB, A_BB, omega, rows).norm(dim=1) * reach
    diffused_bB = torch.where(isolated_B[rows, None], S_BB[rows], (1 - omega) * W_bB @ S_BB)
    return Solve(_softmax(diffused_bB / temperature, rows.start, mask_self), residual_b)


def _cholesky_rows(N_BB: torch.Tensor, omega: float, rows: slice) -> torch.Tensor:
    """Rows [b, B] of (I - omega N)^-1 for a symmetric N with eigenvalues in [-1, 1]."""
    # The symmetric inverse's rows are its columns. A failed factorisation shows in the residual, without a wait here.
    factor_BB, _ = torch.linalg.cholesky_ex(_identity(N_BB) - omega * N_BB)
    return torch.cholesky_solve(_identity(N_BB)[:, rows], factor_BB).T


def _lu_rows(A_BB: torch.Tensor, omega: float, rows: slice) -> torch.Tensor:
    """Rows [b, B] of (I - omega A)^-1. For a row-stochastic A the condition is at most (1 + omega)/(1 - omega)."""
    return torch.linalg.solve(_identity(A_BB) - omega * A_BB, _identity(A_BB)[rows], left=False)


def _residual_rows(Y_bB: torch.Tensor, A_BB: torch.Tensor, omega: float, rows: slice) -> torch.Tensor:
    """e_i - y_i (I - omega A), for all own rows [b, B]."""
    return _identity(A_BB)[rows] - Y_bB + omega * (Y_bB @ A_BB)


def _identity(like_BB: torch.Tensor) -> torch.Tensor:
    return torch.eye(like_BB.shape[0], dtype=like_BB.dtype, device=like_BB.device)


def _softmax(logits_bB: torch.Tensor, first_row: int, mask_self: bool) -> torch.Tensor:
    if mask_self:
        logits_bB = logits_bB.clone()
        logits_bB.diagonal(offset=first_row).fill_(-torch.inf)
    return logits_bB.softmax(1)
