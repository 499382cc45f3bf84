"""Who proposes neighbours: matrix products and top-k by torch, or faiss, which only this file knows.

A proposal need not be right to the last bit and its ties may fall either way: the search (``search.py``) holds it to an
error bound and decides for itself.

Shapes: m queries, n gallery rows of this rank, c candidates, D embedding dimension.
"""

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from dist_obdsd.errors import InputError
from dist_obdsd.evaluation.scores import Distance, rough_rows

BACKENDS = ("auto", "faiss", "torch")
TILE = 16384  # gallery rows scored at a time
ROWS = 256  # queries scored at a time: a tile of float64 scores is 32 MiB
MANY = 256  # neighbours from which on float64 products cost a CPU less than a second look at close float32 scores
FAISS_GPU_MAX = 2048  # most neighbours that faiss returns on a GPU
PROBE_SECONDS = 120.0  # the first use of a GPU by a new process may compile kernels


@dataclass(frozen=True)
class Proposer:
    """Finds for queries [m, D] the c best rows by the inner products of ``rough_rows``."""

    dtype: torch.dtype
    """What the scores are summed in."""
    propose: Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
    """(queries [m, D], c) -> (scores [m, c] of ``dtype``, descending; row numbers [m, c])."""


def choose(rows_nD: torch.Tensor, backend: str, k: int, distance: Distance) -> Proposer:
    """The proposer that a setting asks for; auto takes the one that is quick for k neighbours on this device.

    Raises:
        InputError: faiss is asked for and is missing, or cannot use this GPU.
    """
    if backend not in BACKENDS:
        raise InputError(f"the search backend is {backend!r}; it must be auto, faiss or torch")
    many = k >= MANY and not rows_nD.is_cuda
    if backend == "torch" or (backend == "auto" and many):
        return torch_proposer(rows_nD, torch.float64 if many else torch.float32, distance)
    try:
        faiss = importlib.import_module("faiss")
    except (ImportError, OSError) as error:  # OSError: a shared library that faiss needs is missing
        if backend == "faiss":
            raise InputError(
                f"evaluation.backend=faiss but faiss cannot be imported ({error}); install faiss-gpu, or set "
                f"evaluation.backend=torch, which gives the same result"
            ) from error
        return torch_proposer(rows_nD, torch.float32, distance)
    if rows_nD.is_cuda:
        fault = gpu_fault(rows_nD.device.index or 0)
        if fault and backend == "faiss":
            raise InputError(
                f"evaluation.backend=faiss but faiss cannot search on {rows_nD.device}: {fault}; set "
                f"evaluation.backend=torch, which gives the same result"
            )
        if fault:
            return torch_proposer(rows_nD, torch.float32, distance)
    return faiss_proposer(rows_nD, faiss, distance)


def torch_proposer(rows_nD: torch.Tensor, dtype: torch.dtype, distance: Distance) -> Proposer:
    """Matrix products tile by tile, and the best of each tile merged."""
    # Kept between calls: fresh memory costs a page fault per 4 KiB.
    buffer = rows_nD.new_empty(0, dtype=dtype)

    def propose(queries_mD: torch.Tensor, c: int) -> tuple[torch.Tensor, torch.Tensor]:
        queries_mD = rough_rows(queries_mD.to(dtype), distance, query=True)
        m, n = queries_mD.shape[0], rows_nD.shape[0]
        best_mc = queries_mD.new_empty(m, c)
        found_mc = torch.empty(m, c, dtype=torch.int64, device=rows_nD.device)
        if buffer.numel() < min(m, ROWS) * min(n, TILE):
            buffer.resize_(min(m, ROWS) * min(n, TILE))
        for start in range(0, n, TILE):
            tile_tD = rough_rows(rows_nD[start : start + TILE].to(dtype), distance, query=False)
            held = min(c, start)  # candidates of the tiles before
            kept = min(c, start + tile_tD.shape[0])
            for first in range(0, m, ROWS):
                some = slice(first, first + ROWS)
                rows = queries_mD[some]
                scores = buffer[: rows.shape[0] * tile_tD.shape[0]].view(rows.shape[0], -1)
                torch.mm(rows, tile_tD.T, out=scores)
                scores, columns = scores.topk(min(c, tile_tD.shape[0]), dim=1, sorted=False)
                if held:
                    scores = torch.cat([best_mc[some, :held], scores], dim=1)
                    columns = torch.cat([found_mc[some, :held], columns + start], dim=1)
                    scores, order = scores.topk(kept, dim=1, sorted=False)
                    columns = columns.gather(1, order)
                if start + TILE >= n:
                    order = _descending(scores)
                    scores, columns = scores.gather(1, order), columns.gather(1, order)
                best_mc[some, :kept], found_mc[some, :kept] = scores, columns
        return best_mc, found_mc

    return Proposer(dtype, propose)


def _descending(scores_mc: torch.Tensor) -> torch.Tensor:
    """The order of each row, best first. NumPy's sort is twice as quick as torch's on a CPU with AVX."""
    if scores_mc.is_cuda:
        return scores_mc.argsort(dim=1, descending=True)
    return torch.from_numpy(np.argsort(-scores_mc.numpy(), axis=1))


def faiss_proposer(rows_nD: torch.Tensor, faiss: Any, distance: Distance) -> Proposer:
    """A flat faiss index: on the rank's own GPU and no other, or on the CPU with torch's number of threads."""
    device = rows_nD.device
    rough_nD = rough_rows(rows_nD.float(), distance, query=False)
    if rows_nD.is_cuda:
        config = faiss.GpuIndexFlatConfig()
        config.device = device.index or 0
        index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), rough_nD.shape[1], config)
    else:
        index = faiss.IndexFlatIP(rough_nD.shape[1])
    index.add(rough_nD.cpu().numpy())
    beyond_faiss = torch_proposer(rows_nD, torch.float32, distance)

    def propose(queries_mD: torch.Tensor, c: int) -> tuple[torch.Tensor, torch.Tensor]:
        if rows_nD.is_cuda and c > FAISS_GPU_MAX:
            return beyond_faiss.propose(queries_mD, c)
        with _threads_of_torch(faiss):
            rough_mD = rough_rows(queries_mD.float(), distance, query=True)
            scores, columns = index.search(rough_mD.cpu().numpy(), c)
        return torch.from_numpy(scores).to(device), torch.from_numpy(columns).to(device)

    return Proposer(torch.float32, propose)


@contextmanager
def _threads_of_torch(faiss: Any) -> Iterator[None]:
    """faiss takes every core, or under torchrun one, unless told otherwise; afterwards its number is as it was."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(torch.get_num_threads())
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


# A wheel without kernels for a card ends the process at its first search, so a process of its own tries it.
PROBE = """
import sys
import faiss, numpy
gpu = int(sys.argv[1])
if faiss.get_num_gpus() <= gpu:
    sys.exit(f"faiss sees {faiss.get_num_gpus()} GPUs")
rows = numpy.random.default_rng(0).standard_normal((300, 32), dtype=numpy.float32)
settings = faiss.GpuIndexFlatConfig()
settings.device = gpu
index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), 32, settings)
index.add(rows)
found = index.search(rows, 5)[1]
scores = rows @ rows.T
best = -numpy.sort(-scores, axis=1)[:, :5]
if abs(numpy.take_along_axis(scores, found, 1) - best).max() > 1e-3:
    sys.exit("its search returns wrong neighbours")
"""


@cache
def gpu_fault(gpu: int, probe: str = PROBE, seconds: float = PROBE_SECONDS) -> str:
    """Why faiss cannot search on a GPU, or an empty text. Tried once, in a process that may crash."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", probe, str(gpu)], capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return f"a trial search did not end within {seconds:.0f} s"
    except OSError as error:
        return f"a trial search could not be started ({error.strerror})"
    if done.returncode == 0:
        return ""
    said = done.stderr.strip().splitlines()
    ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    return f"a trial search ended with {ended}" + (f" ({said[-1][:200]})" if said else "")
