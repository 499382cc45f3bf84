"""Exact self-retrieval over real ranks, by time, memory and share of the matrix-multiply peak.

Where n x n comparisons would not fit the budget, fewer queries are asked of the whole gallery; the column ``queries``
says how many.

Shapes: n images of this rank, D embedding dimension.
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence

import torch

from benchmarks import common
from benchmarks.common import Row, matmul_flops, peak_mib, run_case
from dist_obdsd.distributed import collectives, launch
from dist_obdsd.distributed.collectives import assert_equal_across_ranks
from dist_obdsd.evaluation.knn import Gallery
from dist_obdsd.rng import derive

SIZES = (10_000, 50_000, 200_000, 1_000_000)
WORLDS = (1, 2)
BACKENDS = ("torch", "faiss")
NEIGHBOURS = 20
PER_CLASS = 10
DRAWN = 10_000  # images drawn at a time from a seed of their own, so that a rank draws only its share
EXPECTED_SHARE = 0.25  # of the peak, which the number of queries is planned with


def run(options: argparse.Namespace) -> list[Row]:
    """One row per size, world size and backend.

    ``seconds`` are those of the slowest rank, ``peak_mib_per_rank`` is the largest rank's whole process, and ``share``
    is the part of ``peak_gflops`` that the search's multiplications and additions alone reach; the peak is what the
    same ranks together do in plain float32 matrix products, measured just before.
    """
    rows: list[Row] = []
    for n in options.sizes or SIZES:
        for world in options.worlds or WORLDS:
            for backend in BACKENDS:
                what = {"n": n, "dim": options.dim, "ranks": world, "backend": backend}
                case = what | {"threads": options.threads, "budget": options.budget}
                rows.append(what | run_case("benchmarks.search", world, case))
                print(f"{what}: {rows[-1].get('skipped') or 'done'}", file=sys.stderr, flush=True)
    return rows


def run_rank(rank: launch.Runtime, case: Row) -> Row:
    """This rank's part of a case."""
    n, dim, backend, budget = case["n"], case["dim"], case["backend"], case["budget"]
    world, device = rank.world_size, rank.device
    ids_n = torch.arange(n)[rank.rank :: world]
    rows_nD = _embeddings(ids_n, n, dim).to(device)
    ids_n = ids_n.to(device)
    peak = sum(collectives.gather_json(matmul_flops(device)))
    affordable = budget * EXPECTED_SHARE * peak / (2 * n * dim)
    queries = n if affordable >= n else max(world, 10 ** math.floor(math.log10(max(affordable, 1))))
    is_query_n = ids_n < queries
    assert_equal_across_ranks("the size of the search", str(queries))  # and all start together
    started = time.perf_counter()
    k = min(NEIGHBOURS, n - 1)
    for _ in Gallery(rows_nD, ids_n, k, backend=backend).search(rows_nD[is_query_n], ids_n[is_query_n], k):
        pass
    if device.type == "cuda":
        torch.cuda.synchronize()
    told = collectives.gather_json([time.perf_counter() - started, peak_mib()])
    seconds = max(time for time, _ in told)
    return {
        "queries": queries,
        "seconds": seconds,
        "ms_per_query": 1000 * seconds / queries,
        "peak_mib_per_rank": max(mib for _, mib in told),
        "peak_gflops": peak / 1e9,
        "share": 2 * n * queries * dim / seconds / peak,
    }


def _embeddings(ids_n: torch.Tensor, n: int, dim: int) -> torch.Tensor:
    """Unit rows [n, D] of classes of ``PER_CLASS`` images, the same for any number of ranks."""
    parts = []
    for start in range(0, n, DRAWN):
        random = torch.Generator().manual_seed(derive(start, "bench search"))
        centres = torch.randn(DRAWN // PER_CLASS, dim, generator=random).repeat_interleave(PER_CLASS, dim=0)
        rows = centres + torch.randn(DRAWN, dim, generator=random)
        own = ids_n[(ids_n >= start) & (ids_n < start + DRAWN)] - start
        parts.append(torch.nn.functional.normalize(rows[own]))
    return torch.cat(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--sizes", type=common.numbers, metavar="N,N,...", help=f"images (default: {SIZES})")
    parser.add_argument("--worlds", type=common.numbers, metavar="W,W,...", help=f"ranks (default: {WORLDS})")
    return common.main(parser.parse_args(arguments), run)


if __name__ == "__main__":
    sys.exit(main())
