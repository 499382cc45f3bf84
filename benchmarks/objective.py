"""The time of the whole objective, forward and backward, beside a plain script and another library.

On one rank, every variant of the objective; on several, which have their rows of one batch, the ranking loss. A call is
what a training step adds to the network: all messages, the loss and its backward. The implementations of a case take
turns, a block of calls each, as no training step runs another one in between. The fastest call of each counts, on the
slowest rank. ``benchmarks.gradients`` says which gradients across ranks are exact.

Legend: b rows of a rank, B rows of the batch, D embedding dimension, W ranks.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper, DistributedMinerWrapper
from torch.nn import functional

from benchmarks import common
from benchmarks.common import Row
from dist_obdsd.config.sections import DistillationConfig
from dist_obdsd.distributed import collectives, launch
from dist_obdsd.errors import InputError
from dist_obdsd.losses.build import distilled
from dist_obdsd.losses.multi_similarity import MultiSimilarityLoss
from dist_obdsd.manifold.diffusion import Diffusion
from tests import oracle

SIZES = [112, 448, 1024, 4096]
VARIANTS = ("none", "psd", "obdsd")
ROUNDS, CALLS, BLOCK_SECONDS = 50, 20, 0.1
"""At most: rounds of a case, calls of a block, and seconds after which a block begins no further call."""
RANKING = MultiSimilarityLoss()
NAIVE = {name: getattr(RANKING, name) for name in ("alpha", "beta", "threshold", "margin")}
OURS, LOOP, LIBRARY = "dist-obdsd", "loop and inverse", "pytorch-metric-learning"
EFFICIENT = f"{LIBRARY}, efficient"
"""Each rank has only its own rows as anchors: quicker, and another gradient, W times as long if pairs share a rank."""
Implementation = Callable[[torch.Tensor], torch.Tensor]


def run(options: argparse.Namespace) -> list[Row]:
    """A row per number of ranks, batch size, variant and implementation."""
    cases = list(itertools.product(options.worlds, options.sizes))
    for W, B in cases:
        if B % W:
            raise InputError(f"--sizes has {B}, which {W} ranks cannot share equally; give multiples of {W}")
    return [row for W, B in cases for row in common.run_case(run_rank, W, vars(options), W=W, B=B)]


def findings(rows: list[Row]) -> dict[str, float]:
    """Our share of the time of each other implementation."""
    return {
        f"share of {row['implementation']}, {row['variant']}, B={row['B']}"
        + (f" on {row['W']} ranks" if row["W"] > 1 else ""): 1 / row["ratio"]
        for row in rows
        if row.get("ratio", 1) != 1
    }


# ---- on a rank ----


def run_rank(rank: launch.Runtime, case: Row) -> list[Row]:
    """``variant``, ``implementation``, ``seconds`` and ``ratio`` to ours. Collective."""
    B, W = case["B"], rank.world_size
    own = slice(rank.rank * B // W, (rank.rank + 1) * B // W)
    E_BD, T_BD = (embeddings(B, case["dim"], seed, str(rank.device)) for seed in (0, 1))
    labels_B = torch.arange(B, device=rank.device) // 2
    rows: list[Row] = []
    for variant in VARIANTS if W == 1 else VARIANTS[:1]:
        seconds = fastest(implementations(variant, T_BD, labels_B, own), E_BD[own], case["budget"] / 10)
        rows += [
            {"variant": variant, "implementation": name, "seconds": taken, "ratio": taken / seconds[OURS]}
            for name, taken in seconds.items()
        ]
    return rows


def embeddings(B: int, dim: int, seed: int, device: str) -> torch.Tensor:
    """Unit rows [B, dim] in pairs of one class, whose cosines are about 0.2: early in training, when every anchor still
    has a pair to learn from."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn((B + 1) // 2, dim, generator=generator).repeat_interleave(2, 0)[:B]
    return functional.normalize(centres + 2 * torch.randn(B, dim, generator=generator), dim=1).to(device)


def implementations(variant: str, T_BD: torch.Tensor, labels_B: torch.Tensor, own: slice) -> dict[str, Implementation]:
    """Each from the ``own`` rows, which may be all, to the loss on which a rank calls backward under DDP."""
    # CUB200's published settings.
    config = DistillationConfig.model_validate({"target": variant, "weight": 1000.0, "omega": 0.3})
    objective, several = distilled(RANKING, config), len(labels_B[own]) < len(labels_B)
    ways: dict[str, Implementation] = {OURS: lambda E_bD: objective(E_bD, labels_B, T_BD[own]).loss}
    if not several:
        ways[LOOP] = lambda E_BD: naive(E_BD, T_BD, labels_B, config)
    if variant == "none":
        ways[LIBRARY] = library(labels_B[own], several)
        if several:
            ways[EFFICIENT] = library(labels_B[own], several, efficient=True)
    return ways


def library(labels_b: torch.Tensor, several: bool, efficient: bool = False) -> Implementation:
    """The ranking loss of pytorch-metric-learning, on several ranks with its wrapper."""
    loss: Any = losses.MultiSimilarityLoss(alpha=RANKING.alpha, beta=RANKING.beta, base=RANKING.threshold)
    miner: Any = miners.MultiSimilarityMiner(epsilon=RANKING.margin)
    if several:
        loss = DistributedLossWrapper(loss, efficient=efficient)
        miner = DistributedMinerWrapper(miner, efficient=efficient)
    return lambda E_bD: loss(E_bD, labels_b, miner(E_bD, labels_b))


def naive(E_BD: torch.Tensor, T_BD: torch.Tensor, labels_B: torch.Tensor, config: DistillationConfig) -> torch.Tensor:
    """Compute the objective as a single-process script would write it."""
    total, count = oracle.multi_similarity(E_BD, labels_B, **NAIVE)
    loss = total / max(count, 1)
    if config.target == "none":
        return loss
    with torch.no_grad():
        target_BB = naive_target(T_BD, config)
    return loss + config.weight * config.temperature**2 * oracle.kl(E_BD, target_BB, config.temperature) / len(E_BD)


def naive_target(T_BD: torch.Tensor, settings: DistillationConfig | Diffusion) -> torch.Tensor:
    """All rows of psd or obdsd, by a dense inverse."""
    names = ("target", "temperature", "transition_temperature", "omega", "mask_self")
    target_BB: torch.Tensor = oracle.target(T_BD, **{name: getattr(settings, name) for name in names})
    return target_BB


def fastest(ways: dict[str, Implementation], E_bD: torch.Tensor, seconds: float) -> dict[str, float]:
    """Seconds of the fastest call of each on the slowest rank; some rounds within ``seconds``. Collective."""

    def timed(way: Implementation) -> float:
        leaf_bD, started = E_bD.clone().requires_grad_(), time.perf_counter()
        way(leaf_bD).backward()
        if leaf_bD.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    # Every rank makes the same calls. The first one costs more, and so is no measure of what fits a block.
    first = {name: [timed(way), timed(way)][1] for name, way in ways.items()}
    first = {name: max(of[name] for of in collectives.gather_json(first)) for name in ways}
    calls = {name: min(CALLS, 1 + int(BLOCK_SECONDS / first[name])) for name in ways}
    rounds = min(ROUNDS, 1 + int(seconds / sum(calls[name] * first[name] for name in ways)))
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            best[name] = min(best[name], *(timed(way) for _ in range(calls[name])))
    return {name: max(of[name] for of in collectives.gather_json(best)) for name in ways}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = common.parser(__doc__, worlds=[1], sizes=SIZES, dim=128, budget=120)
    return common.main(parser, arguments, run, findings)


if __name__ == "__main__":
    sys.exit(main())
