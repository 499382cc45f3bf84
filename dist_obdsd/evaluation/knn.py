"""Exact search for the k nearest neighbours.

faiss and torch round their scores differently, and so do different shapes and numbers of threads. Where two candidates
lie closer than that rounding, they are scored once more, as float64 dot products in a fixed order. Lists are ordered by
score, then by row number. So a query's list depends neither on the library, nor on the threads, nor on the queries that
are asked with it.

A query whose k-th and last candidate lie that close asks again with more candidates, among at most the k + 1 first of
identical rows: a further copy cannot be among the k nearest.

Shapes: q queries, m queries of a block, n gallery rows, c candidates, k neighbours, p pairs, D embedding dimension.
"""

from collections.abc import Iterator
from functools import cached_property

import torch

from dist_obdsd.evaluation.knn_backends import build_backend

MARGIN = 6
"""Candidates beyond the k + 1 that are needed, so that close scores rarely cost a second search."""
MORE = 8
"""Times as many candidates for the queries that have to ask again."""
ROWS = 1024
"""Rows brought to float64 at a time."""
BLOCK_ROWS, BLOCK_CELLS = 1024, 1 << 17
"""Queries searched at a time at least, and numbers in them: for fewer faiss takes up to six times as long for each."""
PAIRS = 1 << 16
"""Pairs scored at a time in float64."""
SMALLEST = torch.finfo(torch.float64).tiny
NOBODY = torch.iinfo(torch.int64).max
"""Number of an empty place in a list; its score is -inf, so it comes behind everything."""


class Gallery:
    """Rows to be searched."""

    def __init__(self, rows_nD: torch.Tensor, k: int, *, distance: str = "cosine", backend: str = "auto") -> None:
        """
        Args:
            rows_nD: [n, D] float32 or float64 finite rows.
            k: the most neighbours that will be asked for; the backend ``auto`` goes by it.
            distance: cosine ranks by the inner product, which is the cosine of unit rows; euclidean by the distance.
            backend: ``faiss``, ``torch`` or ``auto``, the quicker one of those that work here.

        Raises:
            InputError: faiss is asked for and missing.
        """
        self.rows_nD, self.k, self.distance, self.backend = rows_nD.detach().contiguous(), k, distance, backend
        self.largest_norm = float(rows_nD.norm(dim=1).max()) if len(rows_nD) else 0.0
        self.find, self.rounding = build_backend(self.rows_nD, distance, backend, k)

    def search(
        self, query_qD: torch.Tensor, own_q: torch.Tensor, k: int, *, block: int | None = None, exact: int = 1
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (scores [m, k] float64, row numbers [m, k]), the nearest first.

        Args:
            query_qD: [q, D] rows of the gallery's type.
            own_q: [q] int64: the number of the row that is the query itself and is left out, -1 where none is.
            k: neighbours per query, at most as many as there are.
            block: queries searched at a time at least, where there are as many; None: as suits faiss.
            exact: neighbours whose scores are float64 ones: inner products, or minus squared distances. Beyond them,
                scores that decide nothing are rounded.
        """
        block = block or max(BLOCK_ROWS, BLOCK_CELLS // max(1, query_qD.shape[1]))
        blocks = max(1, len(own_q) // block)
        for rows_mD, own_m in zip(query_qD.detach().chunk(blocks), own_q.chunk(blocks), strict=True):
            yield self._search_block(rows_mD, own_m, k, exact)

    def _search_block(
        self, rows_mD: torch.Tensor, own_m: torch.Tensor, k: int, exact: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        norm_m = rows_mD.double().norm(dim=1)
        scale_m = norm_m * self.largest_norm if self.distance == "cosine" else (norm_m + self.largest_norm) ** 2
        close_m = self.rounding * scale_m
        scores_mk = rows_mD.new_empty(len(rows_mD), k, dtype=torch.float64)
        found_mk = own_m.new_empty(len(rows_mD), k)
        asking_u, c, gallery, kept_n = torch.arange(len(own_m), device=own_m.device), k + 1 + MARGIN, self, None
        while len(asking_u):
            c = min(c, len(gallery.rows_nD))
            rows_uD, close_u = rows_mD[asking_u], close_m[asking_u]
            scores_uc, found_uc = gallery.find(rows_uD, c)
            scores_uc, found_uc = scores_uc.double(), found_uc if kept_n is None else kept_n[found_uc]
            if self.distance == "euclidean":
                scores_uc -= rows_uD.double().square().sum(dim=1, keepdim=True)
            last_u = scores_uc[:, -1]
            scores_uc, found_uc = _without_self(scores_uc, found_uc, own_m[asking_u])
            sure_u = (scores_uc[:, k - 1] - last_u > close_u) | (c == len(gallery.rows_nD))
            self._rescore(rows_uD, scores_uc, found_uc, close_u, exact)
            scores_mk[asking_u], found_mk[asking_u] = scores_uc[:, :k], found_uc[:, :k]
            asking_u, c = asking_u[~sure_u], MORE * c
            if len(asking_u):
                gallery, kept_n = self._without_surplus_copies
        return scores_mk, found_mk

    @cached_property
    def _without_surplus_copies(self) -> tuple["Gallery", torch.Tensor]:
        """At most the k + 1 first of each distinct row, and their numbers."""
        _, copy_of_n = self.rows_nD.unique(dim=0, return_inverse=True)
        order_n = copy_of_n.argsort(stable=True)
        group_n = copy_of_n[order_n]
        place_n = torch.arange(len(group_n), device=group_n.device) - torch.searchsorted(group_n, group_n)
        kept_n = order_n[place_n <= self.k]
        return Gallery(self.rows_nD[kept_n], self.k, distance=self.distance, backend=self.backend), kept_n

    def _rescore(
        self, rows_mD: torch.Tensor, scores_mc: torch.Tensor, found_mc: torch.Tensor, close_m: torch.Tensor, exact: int
    ) -> None:
        """Score close candidates, and the first ``exact``, in float64. In place."""
        near_mc = scores_mc[:, :-1] - scores_mc[:, 1:] <= close_m[:, None]
        wanted_mc = torch.zeros_like(found_mc, dtype=torch.bool)
        wanted_mc[:, :exact] = True
        wanted_mc[:, :-1] |= near_mc
        wanted_mc[:, 1:] |= near_mc
        wanted_mc &= found_mc != NOBODY
        row_p, at_p = wanted_mc.nonzero(as_tuple=True)
        scores_mc[row_p, at_p] = pair_scores(rows_mD, self.rows_nD, row_p, found_mc[row_p, at_p], self.distance)
        # The others are in order.
        mixed_u = near_mc.any(dim=1).nonzero().flatten()
        found_uc, by_number = found_mc[mixed_u].sort(dim=1)
        scores_uc, by_score = scores_mc[mixed_u].gather(1, by_number).sort(dim=1, descending=True, stable=True)
        scores_mc[mixed_u], found_mc[mixed_u] = scores_uc, found_uc.gather(1, by_score)


def _without_self(
    scores_mc: torch.Tensor, found_mc: torch.Tensor, own_m: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take the query's own row out of the lists [m, c]."""
    own_mc, c = found_mc == own_m[:, None], found_mc.shape[1]
    at_m1 = torch.where(own_mc.any(dim=1), own_mc.byte().argmax(dim=1), c)[:, None]
    follows_mc = torch.arange(c, device=own_m.device) >= at_m1
    scores_md = torch.cat([scores_mc, torch.full_like(scores_mc[:, :1], -torch.inf)], dim=1)
    found_md = torch.cat([found_mc, torch.full_like(found_mc[:, :1], NOBODY)], dim=1)
    scores_mc, found_mc = (torch.where(follows_mc, x_md[:, 1:], x_md[:, :-1]) for x_md in (scores_md, found_md))
    return scores_mc, found_mc


def pair_scores(
    x_mD: torch.Tensor, y_nD: torch.Tensor, row_p: torch.Tensor, column_p: torch.Tensor, distance: str
) -> torch.Tensor:
    """Score pairs (x[row], y[column]) in float64, added up in D's own order: [p]."""
    parts = []
    for rows, columns in zip(row_p.split(PAIRS), column_p.split(PAIRS), strict=True):
        x_pD, y_pD = x_mD[rows].double(), y_nD[columns].double()
        parts.append(fixed_sum(x_pD.mul_(y_pD) if distance == "cosine" else x_pD.sub_(y_pD).square_().neg_()))
    return torch.cat(parts)


def fixed_sum(x_pD: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension by halves: its length alone decides the order."""
    while (D := x_pD.shape[1]) > 1:
        half = D // 2
        summed = x_pD[:, :half] + x_pD[:, half : 2 * half]
        x_pD = torch.cat([summed, x_pD[:, 2 * half :]], dim=1) if D % 2 else summed
    return x_pD[:, 0] if x_pD.shape[1] else x_pD.new_zeros(len(x_pD))


def unit_rows(rows_nD: torch.Tensor) -> torch.Tensor:
    """Scale rows [n, D] to length 1; zero rows stay, and no length overflows."""
    unit_nD = torch.empty_like(rows_nD)
    for rows_mD, unit_mD in zip(rows_nD.split(ROWS), unit_nD.split(ROWS), strict=True):
        scaled_mD = rows_mD.to(torch.float64, copy=True)
        if rows_nD.dtype == torch.float64:  # whose squares may be too large or too small
            scaled_mD /= scaled_mD.abs().amax(dim=1, keepdim=True).clamp(min=SMALLEST)
        norm_m = fixed_sum(scaled_mD.square()).sqrt()
        unit_mD.copy_(scaled_mD.div_(norm_m.masked_fill(norm_m == 0, 1)[:, None]))
    return unit_nD
