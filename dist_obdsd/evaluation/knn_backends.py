"""Candidates for the nearest neighbours, by faiss or by torch.

Shapes: m queries, n rows, c candidates, D columns.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from dist_obdsd.errors import InputError

Backend = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
"""(queries [m, D], c) -> (scores [m, c], descending; row numbers [m, c])."""
ROUNDING = {torch.float32: 2e-6, torch.float64: 1e-13}
"""Scores of unit rows closer than this may be in another order than their exact ones."""
MANY = 256
"""Neighbours from which on a CPU is quicker with float64 products than with faiss and exact scores of close pairs."""
TILE = 16384
"""Rows scored at a time by torch."""
SLICE = 256
"""Queries scored at a time by torch on a CPU, so that their scores stay in its cache."""
RESERVOIR = 20
"""Candidates from which on faiss keeps a reservoir, which is quicker; its own default is 100."""


def build_backend(rows_nD: torch.Tensor, distance: str, name: str, k: int) -> tuple[Backend, float]:
    """Build what searches the rows, and tell its rounding.

    ``auto`` is faiss on a CPU where it is installed, but for many neighbours, and torch on a GPU. ``faiss`` raises
    InputError where it is missing.
    """
    many = k >= MANY and not rows_nD.is_cuda
    if name == "faiss" or (name == "auto" and not many and not rows_nD.is_cuda):
        try:
            return _faiss_backend(rows_nD, distance), ROUNDING[torch.float32]
        except (ImportError, OSError) as error:  # OSError: a shared library that faiss needs is missing
            if name == "faiss":
                raise InputError(
                    f"evaluation.backend=faiss but faiss cannot be imported ({error}); install faiss-gpu, or set "
                    f"evaluation.backend=torch, which gives the same result"
                ) from error
    dtype = torch.float64 if many else torch.float32
    return _torch_backend(rows_nD, distance, dtype), ROUNDING[dtype]


def _as_products(rows_nD: torch.Tensor, distance: str, dtype: torch.dtype, *, query: bool = False) -> torch.Tensor:
    """Rows whose inner products rank as ``distance`` does.

    Euclidean: [x, 1] . [2 y, -|y|^2] = |x|^2 - |x - y|^2, and |x|^2 is the same for all that a query is compared with.
    """
    if distance == "cosine":
        return rows_nD.to(dtype)
    if query:
        return torch.cat([rows_nD, torch.ones_like(rows_nD[:, :1])], dim=1).to(dtype)
    return torch.cat([2 * rows_nD, -rows_nD.double().square().sum(dim=1, keepdim=True)], dim=1).to(dtype)


def _torch_backend(rows_nD: torch.Tensor, distance: str, dtype: torch.dtype) -> Backend:
    """Search by matrix products, tile by tile."""

    def find(query_mD: torch.Tensor, c: int) -> tuple[torch.Tensor, torch.Tensor]:
        query_mD = _as_products(query_mD, distance, dtype, query=True)
        best: list[tuple[torch.Tensor, torch.Tensor]] = []
        for start in range(0, len(rows_nD), TILE):
            tile_Dt = _as_products(rows_nD[start : start + TILE], distance, dtype).T
            size = len(query_mD) if query_mD.is_cuda else SLICE
            held_mt = query_mD.new_empty(min(size, len(query_mD)), tile_Dt.shape[1])  # new memory costs time
            parts = []
            for some_mD in query_mD.split(size):
                scores_mt = torch.mm(some_mD, tile_Dt, out=held_mt[: len(some_mD)])
                parts.append(_largest(scores_mt, min(c, tile_Dt.shape[1])))
            scores_mc, found_mc = (torch.cat(of) for of in zip(*parts, strict=True))
            best.append((scores_mc, found_mc + start))
        scores_mc, found_mc = (torch.cat(of, dim=1) for of in zip(*best, strict=True))
        if len(best) > 1:
            scores_mc, order_mc = scores_mc.topk(c, dim=1)
            found_mc = found_mc.gather(1, order_mc)
        return scores_mc, found_mc

    return find


def _largest(scores_mn: torch.Tensor, c: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the c largest of each row, descending, and their places."""
    if scores_mn.is_cuda:
        return scores_mn.topk(c, dim=1)
    # NumPy row by row takes a third of torch's time where c is large.
    scores = scores_mn.numpy()
    best_mc, found_mc = np.empty((len(scores), c), scores.dtype), np.empty((len(scores), c), np.int64)
    for m, row in enumerate(scores):
        largest = row.argpartition(-c)[-c:]
        found_mc[m] = largest[row[largest].argsort()[::-1]]
        best_mc[m] = row[found_mc[m]]
    return torch.from_numpy(best_mc), torch.from_numpy(found_mc)


def _faiss_backend(rows_nD: torch.Tensor, distance: str) -> Backend:
    """Search with faiss, on the rank's own GPU or on the CPU."""
    import faiss

    device, products_nD = rows_nD.device, _as_products(rows_nD, distance, torch.float32).cpu().numpy()
    if rows_nD.is_cuda:
        options = faiss.GpuIndexFlatConfig()
        options.device = device.index or 0
        index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), products_nD.shape[1], options)
        index.add(products_nD)

    def find(query_mD: torch.Tensor, c: int) -> tuple[torch.Tensor, torch.Tensor]:
        query = _as_products(query_mD, distance, torch.float32, query=True).cpu().numpy()
        with _tuned(faiss):
            if rows_nD.is_cuda:
                scores, found = index.search(query, c)
            else:  # without an index, which would copy the rows
                scores, found = faiss.knn(query, products_nD, c, metric=faiss.METRIC_INNER_PRODUCT)
        return torch.from_numpy(scores).to(device), torch.from_numpy(found).to(device)

    return find


@contextmanager
def _tuned(faiss: Any) -> Iterator[None]:
    """Give faiss torch's threads, and a reservoir from fewer candidates on."""
    before = faiss.omp_get_max_threads(), faiss.cvar.distance_compute_min_k_reservoir
    faiss.omp_set_num_threads(torch.get_num_threads())
    faiss.cvar.distance_compute_min_k_reservoir = RESERVOIR
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before[0])
        faiss.cvar.distance_compute_min_k_reservoir = before[1]
