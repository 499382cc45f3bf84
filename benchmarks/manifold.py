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
from benchmarks.common import Row, exponent, peak_mib, run_case
from benchmarks.objective import embeddings, naive_target
from dist_obdsd.distributed import launch
from dist_obdsd.manifold import targets as manifold
from dist_obdsd.manifold.diffusion import Diffusion

SIZES = (112, 448, 1024, 4096, 16384, 32768)
WORLDS = (1, 8, 64)
OWN_ROWS = 512
"""Own rows of the cases that show how the time grows with B alone."""
COMPARABLE = 4096
"""Largest B whose targets are compared with float64."""
SETTINGS = Diffusion(omega=0.5, transition_temperature=0.005)


def run(options: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    sizes = options.sizes or SIZES
    cases = [
        (B, W, solver, "W")
        for B in sizes
        for W in options.worlds or WORLDS
        for solver in ("cholesky", "cg", "inverse")
        if B >= 2 * W and (solver != "inverse" or W == 1)  # the inverse has no share to compute
    ]
    largest = max(sizes)
    cases += [(B, B // OWN_ROWS, "cg", "rows") for B in (largest // 8, largest // 4, largest // 2) if B > OWN_ROWS]
    for B, W, solver, series in cases:
        row: Row = {"B": B, "W": W, "b": B // W, "series": series, "solver": solver}
        reason = too_large(B, W, solver) or too_long(row, rows, options.budget)
        if reason is None:
            case = row | {"dim": options.dim, "threads": options.threads, "budget": options.budget}
            row |= run_case("benchmarks.manifold", 1, case)
        else:
            row["skipped"] = reason
        rows.append(row)
    return rows


def too_long(row: Row, rows: list[Row], budget: float) -> str | None:
    """Why a case is not tried, if a smaller one took so long that this one would not end within the budget."""
    power = 2 if row["solver"] == "cg" else 3
    known = [r for r in rows if r["solver"] == row["solver"] and r["W"] == row["W"] and "seconds" in r]
    if not known:
        return None
    last = known[-1]
    seconds = last["seconds"] * (row["B"] / last["B"]) ** power * (row["b"] / last["b"] if power == 2 else 1)
    return f"would take about {seconds:.0f} s" if seconds > budget else None


def too_large(B: int, W: int, solver: str) -> str | None:
    """Why a case is not tried, if its matrices alone would not fit."""
    wanted = 4 * B * (5 * B if solver == "inverse" else 3 * B // W)
    if solver == "cholesky":
        wanted += 4 * B * B * 4
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0]
    else:
        with open("/proc/meminfo") as file:
            free = 1024 * int(file.read().split("MemAvailable:")[1].split()[0])
    return f"needs {wanted / 2**30:.0f} GiB" if wanted > 0.9 * free else None


def run_rank(rank: launch.Runtime, case: Row) -> Row:
    """Solve for the first rank's rows."""
    B, W, solver, dim, device = case["B"], case["W"], case["solver"], case["dim"], str(rank.device)
    T_BD, rows = embeddings(B, dim, 0, device), slice(0, B // W)
    small = embeddings(64, dim, 1, device)
    for _ in range(2):  # the second time without what a first call of a library costs
        solve(small, slice(0, 8), solver)
    best, started, found = float("inf"), time.perf_counter(), None
    while best == float("inf") or time.perf_counter() - started < 1:
        before = time.perf_counter()
        found = solve(T_BD, rows, solver)
        if rank.device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - before)
    assert found is not None
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


def findings(rows: list[Row]) -> dict[str, float]:
    """How the time grows: t ~ B^exponent, at a fixed number of own rows and, for comparison, of the dense inverse."""
    series = {
        f"exponent at {OWN_ROWS} rows a rank": [r for r in rows if r["solver"] == "cg" and r["b"] == OWN_ROWS],
        "exponent of the inverse": [r for r in rows if r["solver"] == "inverse" and r["B"] >= 1024],
    }
    measured = {
        name: sorted({(row["B"], row["seconds"]) for row in part if "skipped" not in row})
        for name, part in series.items()
    }
    return {name: exponent(points) for name, points in measured.items() if len(points) > 1}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--sizes", type=common.numbers, metavar="B,B,...", help=f"batches (default: {SIZES})")
    parser.add_argument("--worlds", type=common.numbers, metavar="W,W,...", help=f"ranks (default: {WORLDS})")
    return common.main(parser.parse_args(arguments), run, findings)


if __name__ == "__main__":
    sys.exit(main())
