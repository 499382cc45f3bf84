"""Exact distributed k-nearest-neighbour search.

Every rank keeps its part of the gallery. A block of query rows travels round the ranks and comes home with the
candidates of the whole gallery, k + 1 and a few more. faiss and torch round float32 scores differently, and so do
different shapes and numbers of threads. Where two candidates lie closer than that rounding, the rank that has their
rows scores them once more, as float64 dot products in a fixed order. Lists are ordered by score, then by id. So the
lists do not depend on the library, the threads, the number of ranks or the order of the images.

A query whose k-th and last candidate lie that close asks again with more candidates, among at most the k + 1 smallest
ids of identical rows: a further copy cannot be among the k nearest.

Shapes: q queries of this rank, m queries of a block, n gallery rows of this rank, N of all ranks, c candidates,
k neighbours, p pairs, D embedding dimension.
"""

from collections.abc import Iterator

import torch

from dist_obdsd.distributed import collectives
from dist_obdsd.distributed.collectives import assert_equal_across_ranks
from dist_obdsd.distributed.failures import raise_on_all_ranks
from dist_obdsd.errors import InputError
from dist_obdsd.evaluation.knn_backends import build_backend

ROUNDING = 2e-6
"""Scores of unit rows closer than this may be in another order than their float64 scores."""
MARGIN = 6
"""Candidates beyond the k + 1 that are needed, so that close scores rarely cost a second search."""
MORE = 8
"""Times as many candidates for the queries that have to ask again."""
ROWS = 1024
"""Rows brought to float64 at a time."""
PAIRS = 1 << 16
"""Pairs scored at a time in float64."""
SMALLEST = torch.finfo(torch.float64).tiny
NOBODY = torch.iinfo(torch.int64).max
"""Id of an empty place in a list; its score is -inf, so it comes behind everything."""


class Gallery:
    """This rank's part of the gallery, and the search in all ranks' parts."""

    def __init__(
        self, rows_nD: torch.Tensor, ids_n: torch.Tensor, k: int, *, distance: str = "cosine", backend: str = "auto"
    ) -> None:
        """Make the rows ready to be searched.

        Args:
            rows_nD: [n, D] float32 or float64 finite rows; n may be 0 and may differ between the ranks.
            ids_n: [n] int64, unique over all ranks.
            k: the most neighbours that will be asked for; the backend ``auto`` goes by it.
            distance: cosine ranks by the inner product, which is the cosine of unit rows; euclidean by the distance.
            backend: ``faiss``, ``torch`` or ``auto``, the quicker one of those that work here.

        Raises:
            InputError: faiss is asked for and missing.
        """
        self.rows_nD, self.ids_n, self.k = rows_nD.detach().contiguous(), ids_n, k
        self.distance, self.backend = distance, backend
        norms = [float(part.double().norm(dim=1).max()) for part in self.rows_nD.split(ROWS) if len(part)]
        self.largest_norm = max(norms, default=0.0)
        self.sorted_n, self.order_n = ids_n.sort()
        self.find = build_backend(_as_products(self.rows_nD, distance, query=False), backend, k)
        self._distinct: Gallery | None = None

    def search(
        self, query_qD: torch.Tensor, query_ids_q: torch.Tensor, k: int, *, block: int = 2048, exact: int = 1
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (scores [m, k], ids [m, k]) of this rank's queries, block by block. Collective at every step.

        The gallery image that has the query's own id is left out. Ties go to the smaller id. The lists are the same for
        any number of ranks and threads, any distribution and order of the images, and both backends. All ranks yield
        equally often, and a block may be empty.

        Args:
            query_qD: [q, D] rows of this rank, of the gallery's type; q may be 0 and may differ between the ranks.
            query_ids_q: [q] int64.
            k: neighbours per query.
            block: queries that travel together.
            exact: neighbours whose scores are float64 ones: inner products, or minus squared distances. Beyond them,
                scores that decide nothing are rounded to float32.

        Raises:
            InputError: on every rank: the gallery has fewer than k images to offer.
            RunError: on every rank: the ranks differ in k, D, type or block.
        """
        facts = (k, query_qD.shape[1], self.rows_nD.shape[1], query_qD.dtype, self.rows_nD.dtype, block, self.distance)
        assert_equal_across_ranks("the search (k, dimensions, types, block, distance)", str(facts))
        told = collectives.gather_json([len(self.ids_n), self.largest_norm, len(query_ids_q)])
        N, largest, most = sum(n for n, _, _ in told), max(norm for _, norm, _ in told), max(q for _, _, q in told)
        own = k >= N and bool(torch.isin(query_ids_q, collectives.gather_ragged(self.ids_n)).any())
        with raise_on_all_ranks("the nearest-neighbour search"):
            if k > N - own:
                raise InputError(
                    f"k={k} neighbours are asked for but the gallery offers {N - own} ({N} images"
                    f"{', less the query itself' if own else ''}); lower k or enlarge the gallery"
                )
        for start in range(0, most, block):
            mine, height = slice(start, start + block), min(block, most - start)
            yield self._search_block(query_qD[mine].detach(), query_ids_q[mine], k, N, largest, height, exact)

    def _search_block(
        self, rows_mD: torch.Tensor, ids_m: torch.Tensor, k: int, N: int, largest: float, height: int, exact: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the neighbours of one block of queries of every rank. Collective.

        Args:
            largest: the longest gallery row of all ranks.
            height: rows of the largest block of a rank.
        """
        norm_m = rows_mD.double().norm(dim=1)
        scale_m = norm_m * largest if self.distance == "cosine" else (norm_m + largest) ** 2
        close_m1 = (ROUNDING * scale_m)[:, None]
        m = len(ids_m)
        found_mk = rows_mD.new_full((m, k), -torch.inf, dtype=torch.float64), ids_m.new_full((m, k), NOBODY)
        gallery, asking_u, c = self, torch.arange(m, device=ids_m.device), k + 1 + MARGIN
        while True:
            c = min(c, N)
            scores_uc, ids_uc = gallery.candidates(rows_mD[asking_u], height, c)
            last_u, close_u1 = scores_uc[:, -1], close_m1[asking_u]
            scores_uc, ids_uc = _without_self(scores_uc, ids_uc, ids_m[asking_u])
            sure_u = (scores_uc[:, k - 1] - last_u > close_u1[:, 0]) | (c == N)
            scores_uc, ids_uc = gallery.rescore(rows_mD[asking_u], scores_uc, ids_uc, close_u1, height, exact)
            for found, new in zip(found_mk, (scores_uc, ids_uc), strict=True):
                found[asking_u] = new[:, :k]
            asking_u = asking_u[~sure_u]
            height = max(collectives.gather_json(len(asking_u)))
            if not height:
                return found_mk
            gallery, c = gallery.without_surplus_copies(), MORE * c
            N = sum(collectives.gather_json(len(gallery.ids_n)))

    def without_surplus_copies(self) -> "Gallery":
        """Keep at most the k + 1 smallest ids of each distinct row."""
        if self._distinct is None:
            _, copy_of_n = self.rows_nD.unique(dim=0, return_inverse=True)
            order_n = self.ids_n.argsort()
            order_n = order_n[copy_of_n[order_n].argsort(stable=True)]
            group_n = copy_of_n[order_n]
            place_n = torch.arange(len(group_n), device=group_n.device) - torch.searchsorted(group_n, group_n)
            kept, how = order_n[place_n <= self.k], {"distance": self.distance, "backend": self.backend}
            self._distinct = Gallery(self.rows_nD[kept], self.ids_n[kept], self.k, **how)
            self._distinct._distinct = self._distinct
        return self._distinct

    def candidates(self, rows_mD: torch.Tensor, height: int, c: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Find c candidates of all ranks: (scores [m, c] float64, descending; ids [m, c]). Collective."""
        best = (
            torch.full((height, c), -torch.inf, dtype=torch.float64, device=rows_mD.device),
            torch.full((height, c), NOBODY, device=rows_mD.device),
        )

        def visit(hop: int, rows_mD: torch.Tensor, scores_mc: torch.Tensor, ids_mc: torch.Tensor) -> None:
            if not len(self.ids_n) or not len(rows_mD):
                return
            scores, places = self.find(_as_products(rows_mD, self.distance, query=True), min(c, len(self.ids_n)))
            scores, ids = scores.double(), self.ids_n[places]
            if self.distance == "euclidean":
                scores -= rows_mD.double().square().sum(dim=1, keepdim=True)
            if hop:
                scores, ids = torch.cat([scores_mc, scores], dim=1), torch.cat([ids_mc, ids], dim=1)
                scores, order = scores.topk(c, dim=1)
                ids = ids.gather(1, order)
            scores_mc[:, : scores.shape[1]], ids_mc[:, : ids.shape[1]] = scores, ids

        _, scores_mc, ids_mc = collectives.ring_rotate(rows_mD, height, best, visit)
        return scores_mc[: len(rows_mD)], ids_mc[: len(rows_mD)]

    def rescore(
        self,
        rows_mD: torch.Tensor,
        scores_mc: torch.Tensor,
        ids_mc: torch.Tensor,
        close_m1: torch.Tensor,
        height: int,
        exact: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score close candidates, and the first ``exact``, in float64, and order the lists. Collective."""
        near_mc = scores_mc[:, :-1] - scores_mc[:, 1:] <= close_m1
        near_mc &= scores_mc[:, 1:] > -torch.inf
        wanted_mc = torch.zeros_like(ids_mc, dtype=torch.bool)
        wanted_mc[:, :exact] = scores_mc[:, :exact] > -torch.inf
        wanted_mc[:, :-1] |= near_mc
        wanted_mc[:, 1:] |= near_mc

        def visit(hop: int, rows_mD: torch.Tensor, wanted_mc: torch.Tensor, exact_mc: torch.Tensor) -> None:
            if not len(self.ids_n):
                return
            query_p, at_p = (wanted_mc != NOBODY).nonzero(as_tuple=True)
            ids_p = wanted_mc[query_p, at_p]
            place_p = torch.searchsorted(self.sorted_n, ids_p).clamp_(max=len(self.sorted_n) - 1)
            owned_p = self.sorted_n[place_p] == ids_p
            query_p, at_p, place_p = query_p[owned_p], at_p[owned_p], self.order_n[place_p[owned_p]]
            exact_mc[query_p, at_p] = pair_scores(rows_mD, self.rows_nD, query_p, place_p, self.distance)

        asked = collectives.padded(torch.where(wanted_mc, ids_mc, NOBODY), height, NOBODY)
        blank = torch.zeros(height, ids_mc.shape[1], dtype=torch.float64, device=ids_mc.device)
        _, _, exact_mc = collectives.ring_rotate(rows_mD, height, [asked, blank], visit)
        scores_mc = torch.where(wanted_mc, exact_mc[: len(rows_mD)], scores_mc)
        scores_mc, order_mc = scores_mc.sort(dim=1, descending=True, stable=True)
        ids_mc = ids_mc.gather(1, order_mc)
        tied_m = (scores_mc[:, :-1] == scores_mc[:, 1:]).logical_and_(scores_mc[:, 1:] > -torch.inf).any(dim=1)
        if tied_m.any():
            by_id = ids_mc[tied_m].argsort(dim=1)
            scores, ids = scores_mc[tied_m].gather(1, by_id), ids_mc[tied_m].gather(1, by_id)
            scores_mc[tied_m], order = scores.sort(dim=1, descending=True, stable=True)
            ids_mc[tied_m] = ids.gather(1, order)
        return scores_mc, ids_mc


def pair_scores(
    x_mD: torch.Tensor, y_nD: torch.Tensor, row_p: torch.Tensor, column_p: torch.Tensor, distance: str
) -> torch.Tensor:
    """Score pairs (x[row], y[column]) in float64, added up in D's own order: [p]."""
    parts = []
    for rows, columns in zip(row_p.split(PAIRS), column_p.split(PAIRS), strict=True):
        x_pD, y_pD = x_mD[rows].double(), y_nD[columns].double()
        parts.append(fixed_sum(x_pD.mul_(y_pD) if distance == "cosine" else x_pD.sub_(y_pD).square_().neg_()))
    return torch.cat(parts) if parts else x_mD.new_empty(0, dtype=torch.float64)


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


def _without_self(
    scores_mc: torch.Tensor, ids_mc: torch.Tensor, ids_m: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take the query's own image out of the lists, which end in an empty place then: [m, c]."""
    own_mc = ids_mc == ids_m[:, None]
    c = ids_mc.shape[1]
    at_m = torch.where(own_mc.any(dim=1), own_mc.byte().argmax(dim=1), c)
    column_c = torch.arange(c, device=ids_m.device)
    kept_mc = column_c + (column_c >= at_m[:, None])
    empty = torch.full_like(scores_mc[:, :1], -torch.inf), torch.full_like(ids_mc[:, :1], NOBODY)
    scores_mc, ids_mc = torch.cat([scores_mc, empty[0]], dim=1), torch.cat([ids_mc, empty[1]], dim=1)
    return scores_mc.gather(1, kept_mc), ids_mc.gather(1, kept_mc)


def _as_products(rows_nD: torch.Tensor, distance: str, *, query: bool) -> torch.Tensor:
    """Float32 rows whose inner products rank as ``distance`` does.

    Euclidean: [x, 1] . [2 y, -|y|^2] = |x|^2 - |x - y|^2, and |x|^2 is the same for all that a query is compared with.
    """
    if distance == "cosine":
        return rows_nD.float()
    if query:
        return torch.cat([rows_nD, torch.ones_like(rows_nD[:, :1])], dim=1).float()
    return torch.cat([2 * rows_nD, -rows_nD.double().square().sum(dim=1, keepdim=True)], dim=1).float()
