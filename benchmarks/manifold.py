"""One rank's share of the diffusion's targets, by solver, beside the dense inverse.

Every case runs in a process of its own. A rank of W solves for its B/W rows and needs no other rank for it, so one
process measures what each of W would take. Settings are SOP's published ones, the sharpest.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks import common
from benchmarks.common import Row
from benchmarks.objective import SIZES, embeddings, naive_target
from dist_obdsd.distributed import launch
from dist_obdsd.manifold import targets as manifold
from dist_obdsd.manifold.diffusion import Diffusion

DENSE = 4096
"""Largest B for which matrices [B, B] are held, by solvers and by the inverse in float64 that says the error."""
SETTINGS = Diffusion(omega=0.5, transition_temperature=0.005)


def run(options: argparse.Namespace) -> list[Row]:
    """A row per batch, number of ranks and solver."""
    rows: list[Row] = []
    for B, W in itertools.product(options.sizes, options.worlds):
        solvers = ["cg"] + ["cholesky"] * (B <= DENSE) + ["inverse"] * (B <= DENSE and W == 1)
        for solver in solvers if B >= 2 * W else ():
            rows += common.run_case(run_rank, 1, vars(options), B=B, W=W, b=B // W, solver=solver)
    return rows


def run_rank(rank: launch.Runtime, case: Row) -> Row:
    """Solve for the first rank's rows."""
    B, solver, device = case["B"], case["solver"], str(rank.device)
    T_BD, rows = embeddings(B, case["dim"], 0, device), slice(0, case["b"])
    small = embeddings(64, case["dim"], 1, device)
    for _ in range(2):  # the second time without what a first call of a library costs
        solve(small, slice(0, 8), solver)
    seconds: list[float] = []
    while sum(seconds) < 1:
        started = time.perf_counter()
        found = solve(T_BD, rows, solver)
        if rank.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    row: Row = {"seconds": min(seconds), "iterations": found.iterations, "peak_mib": common.peak_mib()}
    if B <= DENSE:
        exact = naive_target(T_BD.double(), SETTINGS)[rows]
        row["error"] = float((found.target_bB - exact).abs().sum(1).max())
    return row


def solve(T_BD: torch.Tensor, rows: slice, solver: str) -> manifold.DiffusionTarget:
    if solver == "inverse":
        target_bB = naive_target(T_BD, SETTINGS)[rows]
        return manifold.DiffusionTarget(target_bB, target_bB.new_zeros(len(target_bB)))
    # Cholesky wants whole matrices; conjugate gradients get the default memory and go tile by tile beyond it.
    memory_gib = 1e3 if solver == "cholesky" else None
    return manifold.target_rows(T_BD, rows, replace(SETTINGS, solver=solver, memory_gib=memory_gib))


def main(arguments: Sequence[str] | None = None) -> int:
    return common.main(common.parser(__doc__, worlds=[1, 8, 64], sizes=SIZES, dim=128), arguments, run)


if __name__ == "__main__":
    sys.exit(main())
