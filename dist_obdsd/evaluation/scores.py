"""The one score that decides who is nearer, and how far a library's quick score may lie from it.

A library's reduction picks its summation order by shape, and an fma rounds once where two operations round twice. So
the score that counts is float64, summed over d = 0..D-1 in that order by one elementwise product and one elementwise
sum per dimension: it has the same bits wherever a pair is scored. Higher is nearer:

    cosine      x.y, the inner product, which is the cosine for unit rows (``unit_rows``)
    euclidean   -|x - y|^2

Shapes: m queries, n gallery rows, p pairs of the two, D embedding dimension.
"""

from typing import Literal

import torch

Distance = Literal["cosine", "euclidean"]
DISTANCES = ("cosine", "euclidean")
PAIRS = 65536  # scored at a time: large enough to hide the cost of a call, small enough for the cache


def scores_of_all(query_Dm: torch.Tensor, gallery_Dn: torch.Tensor, distance: Distance = "cosine") -> torch.Tensor:
    """The scores of all queries with all gallery rows, [m, n] float64.

    Args:
        query_Dm: [D, m] float64, the queries as columns.
        gallery_Dn: [D, n] float32 or float64.
    """
    scores_mn = query_Dm.new_zeros(query_Dm.shape[1], gallery_Dn.shape[1])
    for query_m, gallery_n in zip(query_Dm, gallery_Dn, strict=True):
        _add_term(scores_mn, query_m[:, None], gallery_n.double(), distance)
    return scores_mn


def scores_of_pairs(
    query_Dm: torch.Tensor,
    gallery_Dn: torch.Tensor,
    query_p: torch.Tensor,
    gallery_p: torch.Tensor,
    distance: Distance = "cosine",
) -> torch.Tensor:
    """The scores of p pairs, each given by its columns in the two, [p] float64; the same bits as ``scores_of_all``."""
    scores_p = query_Dm.new_zeros(query_p.numel())
    for start in range(0, query_p.numel(), PAIRS):
        part = slice(start, start + PAIRS)
        for query_m, gallery_n in zip(query_Dm, gallery_Dn, strict=True):
            x, y = query_m.index_select(0, query_p[part]), gallery_n.index_select(0, gallery_p[part])
            _add_term(scores_p[part], x, y, distance)
    return scores_p


def _add_term(total: torch.Tensor, x: torch.Tensor, y: torch.Tensor, distance: Distance) -> None:
    # Each operation a call of its own: a fused one may round once where CPU and GPU differ.
    if distance == "cosine":
        total += x * y
    else:
        difference = x - y
        total -= difference * difference


def unit_rows(rows_nD: torch.Tensor) -> torch.Tensor:
    """The rows at unit length, [n, D] of the same type; a zero row stays zero.

    Norms are float64 in fixed order, so a row has the same bits in whatever share of the rows it is normalised.
    """
    squares_n = rows_nD.new_zeros(rows_nD.shape[0], dtype=torch.float64)
    for d in range(rows_nD.shape[1]):
        column_n = rows_nD[:, d].double()
        squares_n += column_n * column_n
    norm_n = squares_n.sqrt()
    norm_n.masked_fill_(norm_n == 0, 1)
    unit_nD = torch.empty_like(rows_nD)
    for d in range(rows_nD.shape[1]):  # column by column, so that no float64 copy of everything is held
        unit_nD[:, d] = rows_nD[:, d].double() / norm_n
    return unit_nD


def largest_norm(rows_nD: torch.Tensor) -> float:
    """The length of the longest row; 0 where there is none."""
    return max(
        (float(rows_bD.double().norm(dim=1).max()) for rows_bD in rows_nD.split(PAIRS) if len(rows_bD)), default=0.0
    )


def rough_rows(rows_nD: torch.Tensor, distance: Distance, *, query: bool) -> torch.Tensor:
    """Rows whose inner products rank as ``distance`` does, for libraries that multiply matrices.

    Euclidean: [x, 1] . [2 y, -|y|^2] = |x|^2 - |x - y|^2, and |x|^2 is the same for all that a query is compared with.
    """
    if distance == "cosine":
        return rows_nD
    if query:
        return torch.cat([rows_nD, torch.ones_like(rows_nD[:, :1])], dim=1)
    squares_n = rows_nD.double().square().sum(dim=1, keepdim=True)
    return torch.cat([2 * rows_nD, -squares_n.to(rows_nD.dtype)], dim=1)


def rough_offset(rows_mD: torch.Tensor, distance: Distance) -> torch.Tensor:
    """What to add to an inner product of ``rough_rows`` to get the score, per query: [m] float64."""
    return -rows_mD.double().square().sum(dim=1) * (distance == "euclidean")


def error_bound(
    rows_mD: torch.Tensor, largest_norm: float, dtype: torch.dtype, distance: Distance = "cosine"
) -> torch.Tensor:
    """How far a score from ``rough_rows``, summed in ``dtype`` in any order, may be off: [m] float64.

    |fl(x.y) - x.y| <= g |x| |y| with g = (D + 8) u / (1 - (D + 8) u), u the unit roundoff (Higham, Accuracy and
    Stability of Numerical Algorithms, section 3.1); the 8 covers rounding the inputs to ``dtype``, |x|^2, |y|^2 and
    these norms themselves. The terms of -|x - y|^2 sum up to (|x| + |y|)^2 instead of |x| |y|. The last summand is for
    what underflows; where something may overflow the bound is infinite.

    Args:
        largest_norm: of the gallery rows.
    """
    d = rows_mD.shape[1] + 8
    norm_m = rows_mD.double().norm(dim=1)
    size_m = norm_m * largest_norm if distance == "cosine" else (norm_m + largest_norm) ** 2
    relative = sum(d * u / (1 - d * u) for u in (torch.finfo(dtype).eps / 2, torch.finfo(torch.float64).eps / 2))
    reach_m = (1 + norm_m) * (1 + largest_norm) if distance == "cosine" else (1 + norm_m + largest_norm) ** 2
    bound_m = relative * size_m + 8 * d * torch.finfo(dtype).tiny * reach_m
    return bound_m.masked_fill(reach_m > torch.finfo(dtype).max / 4, torch.inf)
