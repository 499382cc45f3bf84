"""One rank's share of the diffusion's targets, by solver, beside the dense inverse.

Every case runs in a process of its own. A rank of W solves for its B/W rows and needs no other rank for it, so one
process measures what each of W would take. Settings are SOP's published ones, the sharpest.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks import common
from benchmarks.common import Row, peak_mib, run_case
from benchmarks.objective import embeddings, naive_target
from dist_obdsd.distributed import launch
from dist_obdsd.manifold import targets as manifold
from dist_obdsd.manifold.diffusion import Diffusion

SIZES = (112, 448, 1024, 4096)
DENSE = 8192
"""Largest B for the solvers that hold matrices [B, B]."""
COMPARABLE = 4096
"""Largest B whose targets are compared with float64."""
SETTINGS = Diffusion(omega=0.5, transition_temperature=0.005)


def run(options: argparse.Namespace) -> list[Row]:
    """A row per batch, number of ranks and solver."""
    rows: list[Row] = []
    for B in options.sizes:
        for W in options.worlds:
            solvers = ["cg"] + ["cholesky"] * (B <= DENSE) + ["inverse"] * (B <= DENSE and W == 1)
            for solver in solvers if B >= 2 * W else ():
                case: Row = {"B": B, "W": W, "b": B // W, "solver": solver}
                more = {"dim": options.dim, "threads": options.threads, "budget": options.budget}
                rows += [case | row for row in run_case("benchmarks.manifold", 1, case | more)]
    return rows


def run_rank(rank: launch.Runtime, case: Row) -> Row:
    """Solve for the first rank's rows."""
    B, solver, device = case["B"], case["solver"], str(rank.device)
    T_BD, rows = embeddings(B, case["dim"], 0, device), slice(0, case["b"])
    small = embeddings(64, case["dim"], 1, device)
    for _ in range(2):  # the second time without what a first call of a library costs
        solve(small, slice(0, 8), solver)
    best, started, found = float("inf"), time.perf_counter(), None
    while found is None or time.perf_counter() - started < 1:
        before = time.perf_counter()
        found = solve(T_BD, rows, solver)
        if rank.device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - before)
    row: Row = {"seconds": best, "iterations": found.iterations, "peak_mib": peak_mib()}
    if B <= COMPARABLE:
        exact = naive_target(T_BD.double(), SETTINGS)[rows]
        row["error"] = float((found.target_bB - exact).abs().sum(1).max())
    return row


def solve(T_BD: torch.Tensor, rows: slice, solver: str) -> manifold.DiffusionTarget:
    if solver == "inverse":
        target_bB = naive_target(T_BD, SETTINGS)[rows]
        return manifold.DiffusionTarget(target_bB, target_bB.new_zeros(len(target_bB)))
    # Cholesky wants whole matrices; conjugate gradients get the default memory and go tile by tile beyond it.
    more: dict[str, Any] = {"memory_gib": 1e3} if solver == "cholesky" else {}
    return manifold.target_rows(T_BD, rows, replace(SETTINGS, solver=solver, **more))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = common.parser(__doc__, worlds=(1, 8, 64))
    parser.add_argument("--sizes", type=common.numbers, default=SIZES, metavar="B,B", help=f"batches {SIZES}")
    return common.main(parser.parse_args(arguments), run)


if __name__ == "__main__":
    sys.exit(main())
