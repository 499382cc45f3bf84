"""Exact distributed k-nearest-neighbour search by inner product, bit for bit the same however it is spread out.

Every rank keeps its part of the gallery. Blocks of query rows travel round the ranks together with the best k found so
far; after W hops a block is home with the k best of the whole gallery. Nothing of size queries x gallery is ever held.

faiss and BLAS sum in an order that depends on the shapes, so their float32 scores differ in the last bits and their
ties fall either way. They only *propose* candidates here. What counts is one float64 score, summed over d = 0..D-1 in
that order, which has the same bits wherever a pair is scored; order is score descending, then id ascending. A proposal
is accepted only where an error bound proves that nothing better was left out; otherwise the search is repeated with
float64 proposals and in the end by scoring every row.

Shapes: q queries of this rank, m queries of the travelling block, n gallery rows of this rank, N of all ranks,
c candidates, k neighbours, D embedding dimension.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from dist_obdsd import collectives
from dist_obdsd.errors import InputError, RunError

MARGIN = 16  # candidates proposed beyond the k + 1 that can be needed, so that close scores rarely cost a second look
TILE = 4096  # gallery rows scored at a time
FAISS_GPU_MAX = 2048  # most neighbours that faiss returns on a GPU
NOBODY = torch.iinfo(torch.int64).max  # id of an empty slot; its score is -inf, so it sorts behind everything

# Proposes for queries [m, D] the c best rows: (float32 scores [m, c], descending; row numbers [m, c]).
Propose = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Neighbours:
    """The k nearest gallery images of each query, best first."""

    scores_qk: torch.Tensor
    """float64 inner products."""
    ids_qk: torch.Tensor
    """int64."""


def nearest(
    query_qD: torch.Tensor,
    query_ids_q: torch.Tensor,
    gallery_nD: torch.Tensor,
    gallery_ids_n: torch.Tensor,
    k: int,
    *,
    backend: str = "auto",
    block: int = 4096,
    exclude_self: bool = True,
) -> Neighbours:
    """The k best gallery images of all ranks for this rank's queries, by inner product. Collective.

    The result for a query has the same bits for any number of ranks, any distribution and order of the gallery, any
    block size and both backends. Ties go to the smaller id. Memory: O((q + n) (D + k)), one id per gallery image of all
    ranks, and a fixed work space.

    Args:
        query_qD: [q, D] float32 or float64 rows of this rank; q may be 0 and may differ between the ranks.
        query_ids_q: [q] int64.
        gallery_nD: [n, D] rows of this rank, of the same type; n may be 0 and may differ.
        gallery_ids_n: [n] int64, unique over all ranks.
        k: neighbours per query, the same on every rank.
        backend: who proposes candidates: faiss, torch, or auto (faiss where it is installed).
        block: queries that travel together.
        exclude_self: leave out the gallery image that has the query's id.

    Raises:
        InputError: on every rank: faiss is asked for and missing, or the gallery has fewer than k images to offer.
        RunError: on every rank: an embedding is NaN or infinite, a gallery id occurs twice, or the ranks differ in k,
            D, type or block.
    """
    setup = (k, query_qD.shape[1], gallery_nD.shape[1], str(query_qD.dtype), str(gallery_nD.dtype), block, exclude_self)
    collectives.agree_same("the search (k, dimensions, types, block, exclude_self)", str(setup))
    with collectives.agree("the nearest-neighbour search"):
        _check_finite("query", query_qD, query_ids_q)
        _check_finite("gallery", gallery_nD, gallery_ids_n)
        if query_qD.dtype != gallery_nD.dtype or query_qD.shape[1] != gallery_nD.shape[1]:
            raise InputError(
                f"queries are {query_qD.dtype} of dimension {query_qD.shape[1]} but the gallery is "
                f"{gallery_nD.dtype} of dimension {gallery_nD.shape[1]}; embed both alike"
            )
        if k < 1 or block < 1:
            raise InputError(f"k={k} and block={block}; both must be at least 1")
        part = _GalleryPart(gallery_nD.detach(), gallery_ids_n, k, exclude_self, backend)
    _check_gallery(query_ids_q, gallery_ids_n, k, exclude_self)

    queries = max(collectives.gather_json(query_qD.shape[0]))
    done = []
    for start in range(0, queries, block):
        # Blocks are padded, so that every rank sends the same shapes the same number of times.
        height = min(block, queries - start)
        rows, ids = query_qD[start : start + height].detach(), query_ids_q[start : start + height]
        best = _nothing(height, k, query_qD.device)
        travelling = [
            torch.tensor([rows.shape[0]], device=rows.device), _padded(rows, height), _padded(ids, height),
            best.scores_qk, best.ids_qk,
        ]  # fmt: skip
        for _ in range(collectives.world_size()):
            m = int(travelling[0])
            _, rows_mD, ids_m, scores_mk, best_mk = travelling
            part.improve(rows_mD[:m], ids_m[:m], scores_mk[:m], best_mk[:m])
            travelling = collectives.ring_pass(travelling)
        done.append(Neighbours(travelling[3][: rows.shape[0]], travelling[4][: rows.shape[0]]))
    if not done:
        return _nothing(0, k, query_qD.device)
    return Neighbours(torch.cat([part.scores_qk for part in done]), torch.cat([part.ids_qk for part in done]))


def labels_of(ids: torch.Tensor, gallery_ids_N: torch.Tensor, gallery_labels_N: torch.Tensor) -> torch.Tensor:
    """The class labels of gallery images, given by id in any shape."""
    sorted_ids, order = gallery_ids_N.sort()
    return gallery_labels_N[order[torch.searchsorted(sorted_ids, ids.contiguous())]]


def fixed_order_scores(query_Dm: torch.Tensor, gallery_Dn: torch.Tensor, columns: torch.Tensor | slice) -> torch.Tensor:
    """float64 inner products whose bits depend on the two rows alone. This score alone decides the order.

    A library's reduction picks its summation order by shape and an fma rounds once where CPU and GPU may round twice;
    so: one elementwise product and one elementwise sum per dimension, in order.

    Args:
        query_Dm: [D, m] float64, the queries as columns.
        gallery_Dn: [D, n] float32 or float64.
        columns: [m, c] row numbers of the gallery, or a slice of c of them for all queries.

    Returns:
        [m, c] float64.
    """
    width = columns.shape[1] if isinstance(columns, torch.Tensor) else len(range(*columns.indices(gallery_Dn.shape[1])))
    scores_mc = query_Dm.new_zeros(query_Dm.shape[1], width)
    for query_m, gallery_n in zip(query_Dm, gallery_Dn, strict=True):
        scores_mc += query_m[:, None] * gallery_n[columns].double()
    return scores_mc


class _GalleryPart:
    """This rank's part of the gallery."""

    def __init__(self, rows_nD: torch.Tensor, ids_n: torch.Tensor, k: int, exclude_self: bool, backend: str) -> None:
        self.rows_nD = rows_nD.contiguous()
        self.rows_Dn = rows_nD.T.contiguous()
        self.ids_n = ids_n
        self.k = k
        self.exclude_self = exclude_self
        self.largest_norm = float(rows_nD.double().norm(dim=1).max()) if ids_n.numel() else 0.0
        self.propose = _proposer(self.rows_nD, backend)

    def improve(
        self, rows_mD: torch.Tensor, ids_m: torch.Tensor, scores_mk: torch.Tensor, best_mk: torch.Tensor
    ) -> None:
        """Merge this part's images into the running best of the queries, in place."""
        if not (self.ids_n.numel() and ids_m.numel()):
            return
        unsure_u = torch.arange(ids_m.numel(), device=ids_m.device)
        attempts = ((torch.float32, self.propose), (torch.float64, _torch_proposer(self.rows_nD, torch.float64)))
        for dtype, propose in attempts:
            if not unsure_u.numel():
                return
            running = Neighbours(scores_mk[unsure_u], best_mk[unsure_u])
            found, sure_u = self._merge_proposed(rows_mD[unsure_u], ids_m[unsure_u], running, dtype, propose)
            scores_mk[unsure_u[sure_u]], best_mk[unsure_u[sure_u]] = found.scores_qk[sure_u], found.ids_qk[sure_u]
            unsure_u = unsure_u[~sure_u]
        for few_u in unsure_u.split(256):
            running = Neighbours(scores_mk[few_u], best_mk[few_u])
            found = self._merge_all(rows_mD[few_u], ids_m[few_u], running)
            scores_mk[few_u], best_mk[few_u] = found.scores_qk, found.ids_qk

    def _merge_proposed(
        self, rows_mD: torch.Tensor, ids_m: torch.Tensor, running: Neighbours, dtype: torch.dtype, propose: Propose
    ) -> tuple[Neighbours, torch.Tensor]:
        """Merge the proposed candidates, and say for each query whether the result is certain ([m] bool)."""
        n = self.ids_n.numel()
        c = min(n, self.k + 1 + MARGIN)
        rough_mc, columns_mc = propose(rows_mD, c)
        exact_mc = fixed_order_scores(rows_mD.double().T.contiguous(), self.rows_Dn, columns_mc)
        found = self._merge(running, exact_mc, self.ids_n[columns_mc], ids_m)
        if c == n:
            return found, torch.ones_like(ids_m, dtype=torch.bool)
        error_m = self._error_bound(rows_mD, dtype)
        # All that was left out has a rough score of at most the last proposed one.
        certain_m = rough_mc[:, -1].double() + error_m < found.scores_qk[:, -1]
        # A library told to use TF32 or bfloat16 breaks the bound, and shows it on the candidates themselves.
        within_m = ((rough_mc.double() - exact_mc).abs() <= error_m[:, None]).all(dim=1)
        return found, certain_m & within_m

    def _merge_all(self, rows_mD: torch.Tensor, ids_m: torch.Tensor, running: Neighbours) -> Neighbours:
        """Merge every row, scored exactly."""
        rows_Dn, ids_n = self._without_surplus_copies
        rows_Dm = rows_mD.double().T.contiguous()
        for start in range(0, ids_n.numel(), 1024):
            columns = slice(start, start + 1024)
            exact_mc = fixed_order_scores(rows_Dm, rows_Dn, columns)
            running = self._merge(running, exact_mc, ids_n[columns].expand_as(exact_mc), ids_m)
        return running

    @cached_property
    def _without_surplus_copies(self) -> tuple[torch.Tensor, torch.Tensor]:
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

    def _merge(
        self, running: Neighbours, scores_mc: torch.Tensor, ids_mc: torch.Tensor, query_ids_m: torch.Tensor
    ) -> Neighbours:
        if self.exclude_self:
            own_mc = ids_mc == query_ids_m[:, None]
            scores_mc, ids_mc = scores_mc.masked_fill(own_mc, -torch.inf), ids_mc.masked_fill(own_mc, NOBODY)
        scores, ids = torch.cat([running.scores_qk, scores_mc], 1), torch.cat([running.ids_qk, ids_mc], 1)
        ids, order = ids.sort(dim=1)
        scores, order = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
        return Neighbours(scores[:, : self.k], ids.gather(1, order)[:, : self.k])

    def _error_bound(self, rows_mD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """How far a score summed in ``dtype``, in any order, may lie from the float64 score. [m] float64.

        |fl(x.y) - x.y| <= g |x| |y| with g = (D + 4) u / (1 - (D + 4) u), u the unit roundoff (Higham, Accuracy and
        Stability of Numerical Algorithms, section 3.1); the 4 covers rounding the inputs to ``dtype`` and these norms
        themselves. The second term is for what underflows.
        """
        d = rows_mD.shape[1] + 4
        norm_m = rows_mD.double().norm(dim=1)
        relative = sum(d * u / (1 - d * u) for u in (torch.finfo(dtype).eps / 2, torch.finfo(torch.float64).eps / 2))
        underflow = 8 * d * torch.finfo(dtype).tiny * (1 + norm_m) * (1 + self.largest_norm)
        bound_m = relative * norm_m * self.largest_norm + underflow
        overflows_m = (1 + norm_m) * (1 + self.largest_norm) > torch.finfo(dtype).max / 4
        return bound_m.masked_fill(overflows_m, torch.inf)


def _torch_proposer(rows_nD: torch.Tensor, dtype: torch.dtype) -> Propose:
    def propose(queries_mD: torch.Tensor, c: int) -> tuple[torch.Tensor, torch.Tensor]:
        best: list[torch.Tensor] = []
        found: list[torch.Tensor] = []
        queries_mD = queries_mD.to(dtype)
        for start in range(0, rows_nD.shape[0], TILE):
            tile_tD = rows_nD[start : start + TILE].to(dtype)
            scores, columns = (queries_mD @ tile_tD.T).topk(min(c, tile_tD.shape[0]), dim=1)
            scores, columns = torch.cat([*best, scores], 1), torch.cat([*found, columns + start], 1)
            scores, kept = scores.topk(min(c, scores.shape[1]), dim=1)
            best, found = [scores], [columns.gather(1, kept)]
        return best[0], found[0]

    return propose


def _faiss_proposer(rows_nD: torch.Tensor, faiss: Any) -> Propose:
    device, on_gpu = rows_nD.device, rows_nD.is_cuda and faiss.get_num_gpus() > 0
    if on_gpu:
        settings = faiss.GpuIndexFlatConfig()
        settings.device = device.index or 0
        resources = faiss.StandardGpuResources()
        index = faiss.GpuIndexFlatIP(resources, rows_nD.shape[1], settings)
    else:
        index = faiss.IndexFlatIP(rows_nD.shape[1])
    index.add(rows_nD.float().cpu().numpy())
    beyond_faiss = _torch_proposer(rows_nD, torch.float32)

    def propose(queries_mD: torch.Tensor, c: int) -> tuple[torch.Tensor, torch.Tensor]:
        if on_gpu and c > FAISS_GPU_MAX:
            return beyond_faiss(queries_mD, c)
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(torch.get_num_threads())  # faiss takes every core unless told otherwise
        try:
            scores, columns = index.search(queries_mD.float().cpu().numpy(), c)
        finally:
            faiss.omp_set_num_threads(threads)
        return torch.from_numpy(scores).to(device), torch.from_numpy(columns).to(device)

    return propose


def _proposer(rows_nD: torch.Tensor, backend: str) -> Propose:
    if backend not in ("auto", "faiss", "torch"):
        raise InputError(f"the search backend is {backend!r}; it must be auto, faiss or torch")
    if backend == "torch":
        return _torch_proposer(rows_nD, torch.float32)
    try:
        faiss = importlib.import_module("faiss")
    except (ImportError, OSError) as error:  # OSError: a shared library that faiss needs is missing
        if backend == "faiss":
            raise InputError(
                f"evaluation.backend=faiss but faiss cannot be imported ({error}); install faiss-gpu, or set "
                f"evaluation.backend=torch, which gives the same result"
            ) from error
        return _torch_proposer(rows_nD, torch.float32)
    if backend == "auto" and rows_nD.is_cuda and faiss.get_num_gpus() == 0:
        return _torch_proposer(rows_nD, torch.float32)
    return _faiss_proposer(rows_nD, faiss)


def _check_finite(what: str, rows_nD: torch.Tensor, ids_n: torch.Tensor) -> None:
    bad_n = ~rows_nD.isfinite().all(dim=1)
    if bad_n.any():
        raise RunError(
            f"{int(bad_n.sum())} of {bad_n.numel()} {what} embeddings are NaN or infinite, the first of image id "
            f"{int(ids_n[bad_n][0])}; the network has diverged, so lower the learning rate or go back to a checkpoint"
        )


def _check_gallery(query_ids_q: torch.Tensor, gallery_ids_n: torch.Tensor, k: int, exclude_self: bool) -> None:
    """The same verdict on every rank: all ids of the gallery are known to all."""
    gallery_ids_N = collectives.gather_ragged(gallery_ids_n)
    size, distinct_N = gallery_ids_N.numel(), gallery_ids_N.unique()
    holds_self = exclude_self and any(collectives.gather_json(bool(torch.isin(query_ids_q, distinct_N).any())))
    with collectives.agree("the nearest-neighbour search"):
        if distinct_N.numel() < size:
            raise RunError(
                f"the gallery's {size} images have only {distinct_N.numel()} different ids; drop the duplicates first"
            )
        if k > size - holds_self:
            raise InputError(
                f"k={k} neighbours are asked for but the gallery offers {size - holds_self} "
                f"({size} images{', less the query itself' if holds_self else ''}); lower k or enlarge the gallery"
            )


def _nothing(rows: int, k: int, device: torch.device) -> Neighbours:
    return Neighbours(
        torch.full((rows, k), -torch.inf, dtype=torch.float64, device=device),
        torch.full((rows, k), NOBODY, dtype=torch.int64, device=device),
    )


def _padded(x: torch.Tensor, height: int) -> torch.Tensor:
    out = x.new_zeros(height, *x.shape[1:])
    out[: x.shape[0]] = x
    return out
