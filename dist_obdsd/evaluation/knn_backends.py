"""Searches of this rank's rows by inner products, by faiss or by torch. The one module of the search that knows faiss.

Shapes: m queries, n rows, c candidates, D columns.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from dist_obdsd.errors import InputError

Backend = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
"""(queries [m, D], c) -> (float32 scores [m, c], descending; row numbers [m, c])."""
MANY = 256
"""Neighbours from which on matrix products are quicker than faiss on a CPU."""
TILE = 16384
"""Rows scored at a time by torch."""
SLICE = 256
"""Rows of scores partitioned at a time."""
RESERVOIR = 20
"""Candidates from which on faiss keeps a reservoir, which is quicker; its own default is 100."""


def build_backend(rows_nD: torch.Tensor, name: str, k: int) -> Backend:
    """Build what searches this rank's rows by inner products.

    ``auto`` is faiss on a CPU where it is installed, but for many neighbours, and torch on a GPU.

    Raises:
        InputError: an unknown name, or faiss is asked for and missing.
    """
    if name not in ("auto", "faiss", "torch"):
        raise InputError(f"the search backend is {name!r}; it must be auto, faiss or torch")
    if name == "torch" or (name == "auto" and (k >= MANY or rows_nD.is_cuda)):
        return _torch_backend(rows_nD)
    try:
        faiss = importlib.import_module("faiss")
    except (ImportError, OSError) as error:  # OSError: a shared library that faiss needs is missing
        if name == "faiss":
            raise InputError(
                f"evaluation.backend=faiss but faiss cannot be imported ({error}); install faiss-gpu, or set "
                f"evaluation.backend=torch, which gives the same result"
            ) from error
        return _torch_backend(rows_nD)
    return _faiss_backend(rows_nD, faiss)


def _torch_backend(rows_nD: torch.Tensor) -> Backend:
    """Search by matrix products, tile by tile."""

    def find(query_mD: torch.Tensor, c: int) -> tuple[torch.Tensor, torch.Tensor]:
        scores_mc, places_mc = query_mD.new_empty(len(query_mD), 0), torch.empty(len(query_mD), 0, dtype=torch.int64)
        places_mc = places_mc.to(rows_nD.device)
        for start in range(0, len(rows_nD), TILE):
            scores, places = _largest(query_mD @ rows_nD[start : start + TILE].T, c)
            scores_mc, places_mc = torch.cat([scores_mc, scores], 1), torch.cat([places_mc, places + start], 1)
            if start:
                scores_mc, order = scores_mc.topk(min(c, scores_mc.shape[1]), dim=1)
                places_mc = places_mc.gather(1, order)
        return scores_mc, places_mc

    return find


def _largest(scores_mn: torch.Tensor, c: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The c largest of each row, descending, and their places. On a CPU NumPy is several times quicker than topk."""
    c = min(c, scores_mn.shape[1])
    if scores_mn.is_cuda:
        return scores_mn.topk(c, dim=1)
    places_mc = torch.empty(len(scores_mn), c, dtype=torch.int64)
    for scores, places in zip(scores_mn.split(SLICE), places_mc.split(SLICE), strict=True):
        negated = -scores.numpy()
        found = np.argpartition(negated, c - 1, axis=1)[:, :c]
        order = np.argsort(np.take_along_axis(negated, found, axis=1), axis=1)
        places.copy_(torch.from_numpy(np.take_along_axis(found, order, axis=1)))
    return scores_mn.gather(1, places_mc), places_mc


def _faiss_backend(rows_nD: torch.Tensor, faiss: Any) -> Backend:
    """Search a flat faiss index, on the rank's own GPU or on the CPU with torch's number of threads."""
    device = rows_nD.device
    if rows_nD.is_cuda:
        options = faiss.GpuIndexFlatConfig()
        options.device = device.index or 0
        index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), rows_nD.shape[1], options)
    else:
        index = faiss.IndexFlatIP(rows_nD.shape[1])
    index.add(rows_nD.cpu().numpy())

    def find(query_mD: torch.Tensor, c: int) -> tuple[torch.Tensor, torch.Tensor]:
        with _tuned(faiss):
            scores, places = index.search(query_mD.cpu().numpy(), c)
        return torch.from_numpy(scores).to(device), torch.from_numpy(places).to(device)

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
