"""Retrieval metrics beside plain faiss and pytorch-metric-learning, and on several ranks, by time and memory.

Recall@1,2,4,8 and MAP@R at the sizes of four test sets: ``dist_obdsd.evaluate``, on one rank beside fifteen lines of
faiss and NumPy, and pytorch-metric-learning's calculator (its P@1, R-precision and MAP@R). Then larger galleries, with
Recall@1 alone and nothing beside.

Times are CPU seconds of a process, so that whoever shares the machine does not count; of several ranks the slowest's.
A rank that waits for messages uses little of them. The implementations take turns, and the quickest round of each
counts. Memory is a rank's whole process.
"""

import argparse
import itertools
import math
import sys
import time
from collections.abc import Sequence

import numpy as np
import torch

import dist_obdsd
from benchmarks import common
from benchmarks.common import Row
from dist_obdsd.distributed import collectives, launch
from dist_obdsd.rng import derive

SIZES = {
    "omniglot": (13180, 128, 20), "cub": (5900, 128, 59), "cars": (8134, 512, 83), "sop": (56580, 128, 5),
    "200k": (200_000, 128, 10), "1m": (1_000_000, 64, 10),
}  # fmt: skip
"""Images, dimensions, images of a class."""
BESIDE = 100_000
"""Images from which on nothing else is measured beside."""
HERE = "dist-obdsd"
DRAWN = 100  # classes drawn at a time from a seed of their own, so that a rank draws only its share


def embeddings(ids_n: torch.Tensor, size: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit rows [n, D] and labels of some images; the same for any number of ranks."""
    n, dim, per_class = size
    parts, labels_n = [], ids_n // per_class
    for first in range(0, -(-n // per_class), DRAWN):
        random = torch.Generator().manual_seed(derive(first, "bench search"))
        centres = torch.randn(DRAWN, dim, generator=random).repeat_interleave(per_class, dim=0)
        rows = 0.4 * centres + torch.randn(DRAWN * per_class, dim, generator=random)
        inside_n = (labels_n >= first) & (labels_n < first + DRAWN)
        parts.append(torch.nn.functional.normalize(rows[ids_n[inside_n] - first * per_class]))
    return torch.cat(parts), labels_n


def faiss_and_numpy(rows: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    import faiss

    x, label_n, ids_n = rows.numpy(), labels.numpy(), np.arange(len(rows))
    index = faiss.IndexFlatIP(x.shape[1])
    index.add(x)
    r_n = np.bincount(label_n)[label_n] - 1
    k = max(8, r_n.max())
    _, found = index.search(x, int(k) + 1)
    itself = found == ids_n[:, None]
    itself[~itself.any(1), -1] = True
    right = label_n[found[~itself].reshape(-1, k)] == label_n[:, None]
    values = {f"recall@{at}": right[:, :at].any(1).mean() for at in (1, 2, 4, 8)}
    right &= np.arange(k) < r_n[:, None]
    values["map@r"] = ((right.cumsum(1) / np.arange(1, k + 1) * right).sum(1) / r_n).mean()
    return values


def metric_learning(rows: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    names = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
    found = AccuracyCalculator(names, k="max_bin_count", device=torch.device("cpu")).get_accuracy(rows, labels)
    return {"recall@1": found["precision_at_1"], "map@r": found["mean_average_precision_at_r"]}


def run(options: argparse.Namespace) -> list[Row]:
    """One row per size, number of ranks and implementation."""
    cases = itertools.product(options.sizes, options.worlds)
    return [
        row
        for size, W in cases
        for row in common.run_case(run_rank, W, vars(options) | {"shape": SIZES[size]}, size=size, W=W)
    ]


def run_rank(rank: launch.Runtime, case: Row) -> list[Row]:
    """This rank's part of a case: a row per implementation. Collective."""
    n, dim, _ = case["shape"]
    ids_n = torch.arange(n)[rank.rank :: rank.world_size]
    rows_nD, labels_n = embeddings(ids_n, case["shape"])
    large = n >= BESIDE
    chosen: Row = {"metrics": ["recall"], "recall_at": [1]} if large else {}
    ways = {HERE: lambda *given: dist_obdsd.evaluate(*given, ids=ids_n, backend="faiss", **chosen)}
    if rank.world_size == 1 and not large:
        ways |= {"faiss and NumPy": faiss_and_numpy, "pytorch-metric-learning": metric_learning}
    dist_obdsd.evaluate(rows_nD[:100], labels_n[:100] * 0, recall_at=[1])  # imports and first calls
    rows = {name: {"implementation": name, "n": n, "dim": dim, "cpu_seconds": math.inf} for name in ways}
    for _ in range(1 if large else case["rounds"]):
        for name, way in ways.items():
            started = time.process_time()
            values = way(rows_nD, labels_n)
            taken = max(collectives.gather_json(time.process_time() - started))
            rows[name]["cpu_seconds"] = min(rows[name]["cpu_seconds"], taken)
            rows[name] |= {metric: float(values[metric]) for metric in ("recall@1", "map@r") if metric in values}
    if len(ways) == 1:
        rows[HERE]["peak_mib_per_rank"] = max(collectives.gather_json(common.peak_mib()))
    return [*rows.values()]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = common.parser(__doc__, worlds=[1, 2], rounds=5)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=[*SIZES][:4], help="test sets")
    return common.main(parser, arguments, run)


if __name__ == "__main__":
    sys.exit(main())
