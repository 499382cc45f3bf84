"""Exact distributed k-nearest-neighbour search, bit for bit the same however it is spread out.

Every rank keeps its part of the gallery. A block of query rows travels round the ranks together with the candidates
found so far; after W hops it is home with the best of the whole gallery. Nothing of size queries x gallery is held.

Backends only *propose* (``proposers.py``): their scores differ in the last bits with the shapes they are given and
their ties fall either way. What counts is the fixed-order float64 score (``scores.py``); order is score descending,
then id ascending. An error bound e says how far a proposed score may lie from it, so candidates whose scores are more
than 2 e apart are in the right order already. Only the others travel round once more and are scored in fixed order by
the rank that has their rows. The result is certain if somewhere after the k-th candidate there is a gap of more than
2 e: nothing behind it can be better. Where there is none, more candidates are proposed, in float64, and in the end
every row is scored.

Shapes: q queries of this rank, m queries of the travelling block, n gallery rows of this rank, N of all ranks,
c candidates, k neighbours, D embedding dimension. A place is a row number in the galleries of all ranks, in rank order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from dist_obdsd.distributed import collectives
from dist_obdsd.distributed.collectives import assert_equal_across_ranks
from dist_obdsd.distributed.failures import raise_on_all_ranks
from dist_obdsd.errors import InputError, RunError
from dist_obdsd.evaluation import proposers
from dist_obdsd.evaluation.scores import (
    DISTANCES,
    Distance,
    error_bound,
    largest_norm,
    rough_offset,
    scores_of_all,
    scores_of_pairs,
)

MARGIN = 16  # candidates proposed beyond the k + 1 that can be needed, so that close scores rarely cost a second look
ENLARGED = 8  # times as many candidates for the queries that were not certain
CHECKED = 2  # first candidates that are always scored, to find out a library that rounds more than it should
SCANNED = 256  # queries of a block when every row is scored
NOBODY = torch.iinfo(torch.int64).max  # id of an empty slot; its score is -inf, so it sorts behind everything


@dataclass(frozen=True)
class Neighbours:
    """The k nearest gallery images of each query, best first."""

    scores_qs: torch.Tensor
    """float64 inner products, or minus squared distances, of the first s that were asked for."""
    ids_qk: torch.Tensor
    """int64."""


def nearest(
    query_qD: torch.Tensor,
    query_ids_q: torch.Tensor,
    gallery_nD: torch.Tensor,
    gallery_ids_n: torch.Tensor,
    k: int,
    *,
    distance: Distance = "cosine",
    backend: str = "auto",
    block: int = 2048,
    exclude_self: bool = True,
    scored: int | None = None,
) -> Neighbours:
    """The k nearest gallery images of all ranks for this rank's queries. Collective.

    The result for a query has the same bits for any number of ranks, any distribution and order of the gallery, any
    block size and both backends. Ties go to the smaller id. Memory: O((q + n) (D + k)), one id per gallery image of all
    ranks, and a work space of O(block (D + k)).

    Args:
        query_qD: [q, D] float32 or float64 rows of this rank; q may be 0 and may differ between the ranks.
        query_ids_q: [q] int64.
        gallery_nD: [n, D] rows of this rank, of the same type; n may be 0 and may differ.
        gallery_ids_n: [n] int64, unique over all ranks.
        k: neighbours per query, the same on every rank.
        distance: cosine ranks by the inner product, which is the cosine for unit rows; euclidean by the distance.
        backend: who proposes candidates: faiss, torch, or auto, the quicker one of those that work here.
        block: queries that travel together.
        exclude_self: leave out the gallery image that has the query's id.
        scored: of how many neighbours, the first ones, the scores are returned; default: of all. Of the others only
            those few are computed that decide the order.

    Raises:
        InputError: on every rank: faiss is asked for and missing, or the gallery has fewer than k images to offer.
        RunError: on every rank: an embedding is NaN or infinite, a gallery id occurs twice, or the ranks differ in k,
            D, type or block.
    """
    scored = k if scored is None else min(scored, k)
    setup = (k, query_qD.shape[1], gallery_nD.shape[1], str(query_qD.dtype), str(gallery_nD.dtype), block,
             exclude_self, distance, scored)  # fmt: skip
    assert_equal_across_ranks("the search (k, dimensions, types, block, exclude_self, distance, scored)", str(setup))
    with raise_on_all_ranks("the nearest-neighbour search"):
        _check_finite("query", query_qD, query_ids_q)
        _check_finite("gallery", gallery_nD, gallery_ids_n)
        if query_qD.dtype != gallery_nD.dtype or query_qD.shape[1] != gallery_nD.shape[1]:
            raise InputError(
                f"queries are {query_qD.dtype} of dimension {query_qD.shape[1]} but the gallery is "
                f"{gallery_nD.dtype} of dimension {gallery_nD.shape[1]}; embed both alike"
            )
        if k < 1 or block < 1:
            raise InputError(f"k={k} and block={block}; both must be at least 1")
        if distance not in DISTANCES:
            raise InputError(f"the distance is {distance!r}; it must be cosine or euclidean")
        part = _GalleryPart(gallery_nD.detach(), gallery_ids_n, k, exclude_self, distance)
        proposer = proposers.choose(part.rows_nD, backend, k, distance)
    ids_N = _gathered_ids(query_ids_q, gallery_ids_n, k, exclude_self)
    search = _Search(part, ids_N, scored)

    # Ranks whose backends differ take the coarsest as the bound, and the same attempts.
    in_float32 = any(collectives.gather_json(proposer.dtype == torch.float32))
    careful = proposers.torch_proposer(part.rows_nD, torch.float64, distance)
    c = k + 1 + MARGIN
    attempts: list[tuple[int, Callable[[torch.Tensor, torch.Tensor, int], tuple[Neighbours, torch.Tensor]]]] = [
        (block, lambda rows, ids, height: search.propose(rows, ids, height, proposer, in_float32, c)),
        (block, lambda rows, ids, height: search.propose(rows, ids, height, careful, False, ENLARGED * c)),
        (min(block, SCANNED), search.scan),
    ]
    found = _nothing(query_qD.shape[0], k, query_qD.device, scored)
    unsure_u = torch.arange(query_qD.shape[0], device=query_qD.device)
    for size, attempt in attempts:
        # Blocks are padded, so that every rank sends the same shapes the same number of times.
        most = max(collectives.gather_json(unsure_u.numel()))
        still_unsure = []
        for start in range(0, most, size):
            own_m = unsure_u[start : start + size]
            height = min(size, most - start)
            of_block, sure_m = attempt(query_qD[own_m].detach(), query_ids_q[own_m], height)
            found.ids_qk[own_m], found.scores_qs[own_m] = of_block.ids_qk, of_block.scores_qs
            still_unsure.append(own_m[~sure_m])
        unsure_u = torch.cat(still_unsure) if still_unsure else unsure_u
    return found


class _GalleryPart:
    """This rank's part of the gallery."""

    def __init__(self, rows_nD: torch.Tensor, ids_n: torch.Tensor, k: int, exclude_self: bool, distance: Distance):
        self.rows_nD = rows_nD.contiguous()
        self.rows_Dn = rows_nD.T.contiguous()
        self.ids_n = ids_n
        self.k = k
        self.exclude_self = exclude_self
        self.distance = distance
        self.largest_norm = largest_norm(self.rows_nD)

    @cached_property
    def without_surplus_copies(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The gallery with at most the k + 1 smallest ids of each distinct row: no other copy can be among the k best.

        A collapsed network maps all images to one point, every query is a tie of everything, and without this the scan
        would take hours on a large gallery.
        """
        _, copy_of_n = self.rows_nD.unique(dim=0, return_inverse=True)
        order_n = self.ids_n.argsort()
        order_n = order_n[copy_of_n[order_n].argsort(stable=True)]
        group_n = copy_of_n[order_n]
        place_n = torch.arange(group_n.numel(), device=group_n.device) - torch.searchsorted(group_n, group_n)
        kept = order_n[place_n <= self.k]
        return self.rows_Dn[:, kept].contiguous(), self.ids_n[kept]


class _Search:
    """One block of queries of every rank at a time; see the module's text. Its methods are collective."""

    def __init__(self, part: _GalleryPart, ids_N: torch.Tensor, scored: int) -> None:
        self.part, self.ids_N, self.scored = part, ids_N, scored
        told = collectives.gather_json([part.ids_n.numel(), part.largest_norm])
        self.first = sum(n for n, _ in told[: collectives.rank()])
        """Place of this rank's first row."""
        self.largest_norm = max(norm for _, norm in told)

    def propose(
        self,
        rows_mD: torch.Tensor,
        ids_m: torch.Tensor,
        height: int,
        proposer: proposers.Proposer,
        in_float32: bool,
        c: int,
    ) -> tuple[Neighbours, torch.Tensor]:
        """The neighbours of this rank's block from c candidates each, and where they are certain ([m] bool).

        Args:
            height: rows of the largest block of a rank.
            in_float32: whether some rank proposes in float32.
        """
        k, distance = self.part.k, self.part.distance
        rough_mc, places_mc = self._candidates(rows_mD, height, proposer, min(c, self.ids_N.numel()))
        e_m = error_bound(rows_mD, self.largest_norm, torch.float32 if in_float32 else torch.float64, distance)
        rough_mc, places_mc, ids_mc = self._without_self(rough_mc, places_mc, ids_m)
        far_mc = rough_mc[:, :-1] - rough_mc[:, 1:] > 2 * e_m[:, None]  # a candidate from the next
        behind = far_mc[:, k - 1 :]
        sure_m = behind.any(dim=1) & e_m.isfinite()
        last_m = k - 1 + behind.int().argmax(dim=1)  # the last candidate that can be among the k best

        close_mc = torch.zeros_like(places_mc, dtype=torch.bool)
        close_mc[:, :-1] |= ~far_mc
        close_mc[:, 1:] |= ~far_mc
        position_c = torch.arange(places_mc.shape[1], device=places_mc.device)
        relevant_mc = (position_c <= last_m[:, None]) & (places_mc >= 0) & sure_m[:, None]
        mixed_m = (close_mc & relevant_mc).any(dim=1)
        wanted_mc = relevant_mc & (close_mc | (position_c < max(CHECKED, self.scored)))
        exact_mc = self._score(rows_mD, torch.where(wanted_mc, places_mc, -1), height)
        # A library told to use TF32 or bfloat16 breaks the bound, and shows it on the candidates themselves.
        sure_m &= (~wanted_mc | ((exact_mc - rough_mc).abs() <= e_m[:, None])).all(dim=1)

        # Rough scores stand where they differ from all others by enough to be in order with exact ones, too.
        score_mc = torch.where(wanted_mc, exact_mc, rough_mc)
        if mixed_m.any():
            score_mc[mixed_m], ids_mc[mixed_m] = _in_order(score_mc[mixed_m], ids_mc[mixed_m])
        return Neighbours(score_mc[:, : self.scored], ids_mc[:, :k]), sure_m

    def _candidates(
        self, rows_mD: torch.Tensor, height: int, proposer: proposers.Proposer, c: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(rough scores [m, c] float64, descending; places [m, c]) of the whole gallery, the query itself included."""
        own_n = self.part.ids_n.numel()
        rough_mc = torch.full((height, c), -torch.inf, dtype=torch.float64, device=rows_mD.device)
        places_mc = torch.full((height, c), -1, device=rows_mD.device)

        def visit(hop: int, rows_mD: torch.Tensor, rough_mc: torch.Tensor, places_mc: torch.Tensor) -> None:
            if not own_n or not rows_mD.shape[0]:
                return
            scores, columns = proposer.propose(rows_mD, min(c, own_n))
            scores = scores.double() + rough_offset(rows_mD, self.part.distance)[:, None]
            columns = columns + self.first
            if hop:  # on the first there is nothing to merge with
                scores, columns = torch.cat([rough_mc, scores], dim=1), torch.cat([places_mc, columns], dim=1)
                scores, order = scores.topk(c, dim=1)
                columns = columns.gather(1, order)
            rough_mc[:, : scores.shape[1]], places_mc[:, : columns.shape[1]] = scores, columns

        _, rough_mc, places_mc = collectives.ring_rotate(rows_mD, height, [rough_mc, places_mc], visit)
        return rough_mc[: rows_mD.shape[0]], places_mc[: rows_mD.shape[0]]

    def _without_self(
        self, rough_mc: torch.Tensor, places_mc: torch.Tensor, ids_m: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(rough scores, places, ids) without the query's own image, c + 1 long: what was left out ends them.

        That is as good as the list's last at best, or nothing if the list holds the whole gallery.
        """
        complete = rough_mc.shape[1] == self.ids_N.numel()
        end_m1 = torch.full_like(rough_mc[:, -1:], -torch.inf) if complete else rough_mc[:, -1:]
        ids_mc = torch.where(places_mc >= 0, self.ids_N[places_mc.clamp(min=0)], NOBODY)
        is_self_mc = (ids_mc == ids_m[:, None]) & self.part.exclude_self
        # True from the query's own place on, where the next entry moves up.
        moved_mc = nn.functional.pad(is_self_mc.cummax(dim=1).values, (0, 1), value=False)
        moved_mc[:, -1] = moved_mc[:, -2]
        longer = (
            torch.cat([rough_mc, end_m1, end_m1], dim=1),
            nn.functional.pad(places_mc, (0, 2), value=-1),
            torch.cat([ids_mc, ids_mc.new_full((len(ids_mc), 2), NOBODY)], dim=1),
        )
        rough_mc, places_mc, ids_mc = (torch.where(moved_mc, x_mc[:, 1:], x_mc[:, :-1]) for x_mc in longer)
        return rough_mc, places_mc, ids_mc

    def _score(self, rows_mD: torch.Tensor, places_mc: torch.Tensor, height: int) -> torch.Tensor:
        """The scores of the queries with the gallery rows at the places, NaN where the place is -1. [m, c] float64."""
        exact_mc = torch.full(places_mc.shape, torch.nan, dtype=torch.float64, device=rows_mD.device)

        def visit(hop: int, rows_mD: torch.Tensor, places_mc: torch.Tensor, exact_mc: torch.Tensor) -> None:
            owned_mc = (places_mc >= self.first) & (places_mc < self.first + self.part.ids_n.numel())
            query_p, at_p = owned_mc.nonzero(as_tuple=True)
            columns_p = places_mc[query_p, at_p] - self.first
            rows_Dm = rows_mD.double().T.contiguous()
            exact_mc[query_p, at_p] = scores_of_pairs(
                rows_Dm, self.part.rows_Dn, query_p, columns_p, self.part.distance
            )

        padded = [collectives.padded(places_mc, height, -1), collectives.padded(exact_mc, height, torch.nan)]
        return collectives.ring_rotate(rows_mD, height, padded, visit)[2][: rows_mD.shape[0]]

    def scan(self, rows_mD: torch.Tensor, ids_m: torch.Tensor, height: int) -> tuple[Neighbours, torch.Tensor]:
        """The neighbours of this rank's block by scoring every row of every rank; always certain."""
        k, part = self.part.k, self.part
        nothing = _nothing(height, k, rows_mD.device, k)

        def visit(hop: int, rows_mD: torch.Tensor, ids_m1: torch.Tensor, *best: torch.Tensor) -> None:
            rows_Dn, ids_n = part.without_surplus_copies
            rows_Dm = rows_mD.double().T.contiguous()
            scores_mk, found_mk = best
            for start in range(0, ids_n.numel(), 1024):
                tile = slice(start, start + 1024)
                scores_mt = scores_of_all(rows_Dm, rows_Dn[:, tile], part.distance)
                ids_mt = ids_n[tile].expand_as(scores_mt)
                if part.exclude_self:
                    own_mt = ids_mt == ids_m1
                    scores_mt, ids_mt = scores_mt.masked_fill(own_mt, -torch.inf), ids_mt.masked_fill(own_mt, NOBODY)
                scores, ids = _in_order(torch.cat([scores_mk, scores_mt], 1), torch.cat([found_mk, ids_mt], 1))
                scores_mk[:], found_mk[:] = scores[:, :k], ids[:, :k]

        travelling = [collectives.padded(ids_m[:, None], height, 0), nothing.scores_qs, nothing.ids_qk]
        *_, scores_mk, found_mk = collectives.ring_rotate(rows_mD, height, travelling, visit)
        m = rows_mD.shape[0]
        return Neighbours(scores_mk[:m, : self.scored], found_mk[:m]), torch.ones_like(ids_m, dtype=torch.bool)


def _in_order(scores_mc: torch.Tensor, ids_mc: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sorted by score descending, then id ascending."""
    scores_mc, order_mc = scores_mc.sort(dim=1, descending=True)
    ids_mc = ids_mc.gather(1, order_mc)
    tied_m = (scores_mc[:, 1:] == scores_mc[:, :-1]).any(dim=1)
    if tied_m.any():
        ids_tc, order_tc = ids_mc[tied_m].sort(dim=1)
        scores_tc, by_score_tc = scores_mc[tied_m].gather(1, order_tc).sort(dim=1, descending=True, stable=True)
        scores_mc[tied_m], ids_mc[tied_m] = scores_tc, ids_tc.gather(1, by_score_tc)
    return scores_mc, ids_mc


def _check_finite(what: str, rows_nD: torch.Tensor, ids_n: torch.Tensor) -> None:
    bad_n = ~rows_nD.isfinite().all(dim=1)
    if bad_n.any():
        raise RunError(
            f"{int(bad_n.sum())} of {bad_n.numel()} {what} embeddings are NaN or infinite, the first of image id "
            f"{int(ids_n[bad_n][0])}; the network has diverged, so lower the learning rate or go back to a checkpoint"
        )


def _gathered_ids(query_ids_q: torch.Tensor, gallery_ids_n: torch.Tensor, k: int, exclude_self: bool) -> torch.Tensor:
    """The gallery's ids by place, [N], checked: the same verdict on every rank, since all ids are known to all."""
    ids_N = collectives.gather_ragged(gallery_ids_n)
    size, distinct_N = ids_N.numel(), ids_N.unique()
    holds_self = exclude_self and any(collectives.gather_json(bool(torch.isin(query_ids_q, distinct_N).any())))
    with raise_on_all_ranks("the nearest-neighbour search"):
        if distinct_N.numel() < size:
            raise RunError(
                f"the gallery's {size} images have only {distinct_N.numel()} different ids; drop the duplicates first"
            )
        if k > size - holds_self:
            raise InputError(
                f"k={k} neighbours are asked for but the gallery offers {size - holds_self} "
                f"({size} images{', less the query itself' if holds_self else ''}); lower k or enlarge the gallery"
            )
    return ids_N


def _nothing(rows: int, k: int, device: torch.device, scored: int) -> Neighbours:
    return Neighbours(
        torch.full((rows, scored), -torch.inf, dtype=torch.float64, device=device),
        torch.full((rows, k), NOBODY, device=device),
    )
