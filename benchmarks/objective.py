"""``bench objective``: the whole objective, forward and backward, beside a plain script and another library.

One process holds the whole batch; ``--worlds`` adds the ranking loss over several ranks (``peers.py``). The
implementations of a case take turns, and the fastest call of each counts, so that a machine whose speed drifts slows
all of them down alike. A turn is a block of calls in a row, for each alike: no training step runs another
implementation in between, whose code and data would fill the processor's caches and cost the fastest one most.
"""

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from benchmarks import reference
from benchmarks.report import Row
from dist_obdsd.config import DistillationConfig
from dist_obdsd.losses.batch_view import BatchView
from dist_obdsd.losses.build import distilled
from dist_obdsd.losses.multi_similarity import MultiSimilarityLoss

SIZES = (112, 448, 1024, 4096)
ARMS = ("none", "psd", "obdsd")
ROUNDS = 50
BLOCK_CALLS, BLOCK_SECONDS = 20, 0.1
"""A block ends after so many calls, or with the call that passes so many seconds."""
RANKING = MultiSimilarityLoss()
PEER = "pytorch-metric-learning"
NO_PEER = f"{PEER} is not installed; pip install {PEER}"
PLOT: dict[str, Any] = {
    "x": "B",
    "y": "seconds",
    "label": lambda row: f"{row['arm']}, {row['implementation']}{_where(row)}",
    "title": "objective, forward and backward",
}


def distillation(arm: str) -> DistillationConfig:
    """CUB200's published settings."""
    return DistillationConfig.model_validate({"target": arm, "weight": 1000.0, "omega": 0.3})


def embeddings(B: int, dim: int, seed: int, device: str) -> torch.Tensor:
    """Unit rows [B, dim] in pairs of one class, whose cosines are about 0.2: early in training, when every anchor still
    has a pair to learn from."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn((B + 1) // 2, dim, generator=generator).repeat_interleave(2, 0)[:B]
    return functional.normalize(centres + 2 * torch.randn(B, dim, generator=generator), dim=1).to(device)


def run(options: Any) -> list[Row]:
    from benchmarks import peers  # which imports this module

    sizes, worlds = options.sizes or SIZES, [W for W in options.worlds or () if W > 1]
    peers.check(sizes, worlds)
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[Row] = []
    too_slow: set[str] = set()
    for B in sizes:
        E_BD, T_BD = embeddings(B, options.dim, 0, device), embeddings(B, options.dim, 1, device)
        labels_B = torch.arange(B, device=device) // 2
        for arm in ARMS:
            ways = {name: way for name, way in implementations(arm, T_BD, labels_B).items() if name not in too_slow}
            seconds = fastest(ways, E_BD, options.budget)
            too_slow |= {name for name, taken in seconds.items() if taken > options.budget / 4}
            rows += [
                {"B": B, "arm": arm, "implementation": name, "seconds": taken, "ratio": taken / seconds["dist-obdsd"]}
                for name, taken in seconds.items()
            ]
    for world in worlds:
        rows += peers.run(sizes, world, options)
    if not has_peer():
        rows.append({"arm": "none", "implementation": PEER, "skipped": NO_PEER})
    return rows


def findings(rows: list[Row]) -> dict[str, float]:
    """Our share of the time of each other implementation."""
    return {
        f"share of {row['implementation']}, {row['arm']}, B={row['B']}{_where(row)}": 1 / row["ratio"]
        for row in rows
        if row.get("ratio", 1) != 1
    }


def _where(row: Row) -> str:
    return f" on {row['W']} ranks" if "W" in row else ""


def implementations(
    arm: str, T_BD: torch.Tensor, labels_B: torch.Tensor
) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Each from the student's rows to the loss."""
    config = distillation(arm)
    objective = distilled(RANKING, config)

    def ours(E_BD: torch.Tensor) -> torch.Tensor:
        terms = objective.terms(BatchView(E_BD, E_BD, labels_B, 0), T_BD)
        return objective.loss(terms, {name: term.count for name, term in terms.items()}, 1, 1.0)

    ways = {
        "dist-obdsd": ours,
        "loop and inverse": lambda E_BD: reference.objective(E_BD, T_BD, labels_B, RANKING, config),
    }
    if arm == "none" and has_peer():
        loss, miner = peer()
        ways[PEER] = lambda E_BD: loss(E_BD, labels_B, miner(E_BD, labels_B))
    return ways


def has_peer() -> bool:
    """Whether pytorch-metric-learning is installed."""
    return importlib.util.find_spec("pytorch_metric_learning") is not None


def peer() -> tuple[Any, Any]:
    """The same ranking loss and its miner in pytorch-metric-learning."""
    from pytorch_metric_learning import losses, miners

    miner = miners.MultiSimilarityMiner(epsilon=RANKING.margin)
    return losses.MultiSimilarityLoss(alpha=RANKING.alpha, beta=RANKING.beta, base=RANKING.threshold), miner


def fastest(
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]], E_BD: torch.Tensor, budget: float
) -> dict[str, float]:
    """Seconds of one forward and backward of each: the least of all calls, in ``ROUNDS`` rounds at most."""
    best = dict.fromkeys(ways, float("inf"))
    started = time.perf_counter()
    for turn in range(ROUNDS):
        if turn > 1 and time.perf_counter() - started > budget / 10:
            break
        for name, way in ways.items():
            block = time.perf_counter()
            for _ in range(BLOCK_CALLS):
                leaf_BD = E_BD.clone().requires_grad_()
                before = time.perf_counter()
                way(leaf_BD).backward()
                if leaf_BD.is_cuda:
                    torch.cuda.synchronize()
                after = time.perf_counter()
                best[name] = min(best[name], after - before)
                if after - block > BLOCK_SECONDS:
                    break
    return best
