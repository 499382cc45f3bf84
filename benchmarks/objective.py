"""The whole objective, forward and backward, beside a plain script and another library.

One process holds the whole batch; ``--worlds`` adds the ranking loss over several ranks. The
implementations of a case take turns, and the fastest call of each counts, so that a machine whose speed drifts slows
all of them down alike. A turn is a block of calls in a row, for each alike: no training step runs another
implementation in between, whose code and data would fill the processor's caches and cost the fastest one most.

Over several ranks, every rank has its rows of one batch. A call is what a training step adds to the network: all
messages, the loss and its backward. The fastest call counts, on the slowest rank.

    error    of the gradient at a rank's own rows, as DDP's mean over the ranks makes it, beside the same
             implementation's in one process with the whole batch; relative to that one's norm, on the worst rank
    cosine   of the angle between the two, on the worst rank: whether more than the length is off

Legend: b rows of a rank, B rows of the batch, D embedding dimension, W ranks.
"""

import argparse
import importlib.util
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from benchmarks import common
from benchmarks.common import Row, run_case
from dist_obdsd.config.sections import DistillationConfig
from dist_obdsd.distributed import collectives, launch
from dist_obdsd.errors import InputError
from dist_obdsd.losses.build import distilled
from dist_obdsd.losses.multi_similarity import MultiSimilarityLoss
from dist_obdsd.manifold.diffusion import Diffusion
from tests import oracle

SIZES = (112, 448, 1024, 4096)
VARIANTS = ("none", "psd", "obdsd")
ROUNDS = 50
BLOCK_CALLS, BLOCK_SECONDS = 20, 0.1
"""A block ends after so many calls, or with the call that passes so many seconds."""
RANKING = MultiSimilarityLoss()
NAIVE = {name: getattr(RANKING, name) for name in ("alpha", "beta", "threshold", "margin")}
OURS, LIBRARY = "dist-obdsd", "pytorch-metric-learning"
EFFICIENT = f"{LIBRARY}, efficient"
"""Each rank has only its own rows as anchors: quicker, and another gradient, W times as long if pairs share a rank."""
NO_LIBRARY = f"{LIBRARY} is not installed; pip install {LIBRARY}"
Implementation = Callable[[torch.Tensor], torch.Tensor]


def distillation(variant: str) -> DistillationConfig:
    """CUB200's published settings."""
    return DistillationConfig.model_validate({"target": variant, "weight": 1000.0, "omega": 0.3})


def embeddings(B: int, dim: int, seed: int, device: str) -> torch.Tensor:
    """Unit rows [B, dim] in pairs of one class, whose cosines are about 0.2: early in training, when every anchor still
    has a pair to learn from."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn((B + 1) // 2, dim, generator=generator).repeat_interleave(2, 0)[:B]
    return functional.normalize(centres + 2 * torch.randn(B, dim, generator=generator), dim=1).to(device)


def run(options: argparse.Namespace) -> list[Row]:
    sizes, worlds = options.sizes or SIZES, [W for W in options.worlds or () if W > 1]
    check_shares(sizes, worlds)
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[Row] = []
    too_slow: set[str] = set()
    for B in sizes:
        E_BD, T_BD = embeddings(B, options.dim, 0, device), embeddings(B, options.dim, 1, device)
        labels_B = torch.arange(B, device=device) // 2
        for variant in VARIANTS:
            ways = {name: way for name, way in implementations(variant, T_BD, labels_B).items() if name not in too_slow}
            seconds = fastest(ways, E_BD, options.budget)
            too_slow |= {name for name, taken in seconds.items() if taken > options.budget / 4}
            rows += [
                {"B": B, "variant": variant, "implementation": name, "seconds": taken, "ratio": taken / seconds[OURS]}
                for name, taken in seconds.items()
            ]
    for world in worlds:
        rows += measure_ranks(sizes, world, options)
    if not has_library():
        rows.append({"variant": "none", "implementation": LIBRARY, "skipped": NO_LIBRARY})
    return rows


def findings(rows: list[Row]) -> dict[str, float]:
    """Our share of the time of each other implementation."""
    return {
        f"share of {row['implementation']}, {row['variant']}, B={row['B']}{_where(row)}": 1 / row["ratio"]
        for row in rows
        if row.get("ratio", 1) != 1
    }


def _where(row: Row) -> str:
    return f" on {row['W']} ranks" if "W" in row else ""


def implementations(variant: str, T_BD: torch.Tensor, labels_B: torch.Tensor) -> dict[str, Implementation]:
    """Each from the student's rows to the loss."""
    config = distillation(variant)
    objective = distilled(RANKING, config)

    def ours(E_BD: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = objective(E_BD, labels_B, T_BD).loss
        return loss

    ways = {
        OURS: ours,
        "loop and inverse": lambda E_BD: naive(E_BD, T_BD, labels_B, config),
    }
    if variant == "none" and has_library():
        loss, miner = library_loss()
        ways[LIBRARY] = lambda E_BD: loss(E_BD, labels_B, miner(E_BD, labels_B))
    return ways


def naive(E_BD: torch.Tensor, T_BD: torch.Tensor, labels_B: torch.Tensor, config: DistillationConfig) -> torch.Tensor:
    """The objective as a single-process script would write it."""
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


def has_library() -> bool:
    """Whether pytorch-metric-learning is installed."""
    return importlib.util.find_spec("pytorch_metric_learning") is not None


def library_loss() -> tuple[Any, Any]:
    """The same ranking loss and its miner in pytorch-metric-learning."""
    from pytorch_metric_learning import losses, miners

    miner = miners.MultiSimilarityMiner(epsilon=RANKING.margin)
    return losses.MultiSimilarityLoss(alpha=RANKING.alpha, beta=RANKING.beta, base=RANKING.threshold), miner


def fastest(ways: dict[str, Implementation], E_BD: torch.Tensor, budget: float) -> dict[str, float]:
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


# ---- over several ranks ----------------------------------------------------------------------------------------------


def check_shares(sizes: Sequence[int], worlds: Sequence[int]) -> None:
    """Check that every number of ranks can share every batch.

    Raises:
        InputError: one cannot.
    """
    for B, W in itertools.product(sizes, worlds):
        if B % W:
            raise InputError(f"--sizes has {B}, which {W} ranks cannot share equally; give multiples of {W}")


def measure_ranks(sizes: Sequence[int], world: int, options: argparse.Namespace) -> list[Row]:
    """A row per batch size and implementation."""
    rows: list[Row] = []
    for B in sizes:
        case = {"B": B, "dim": options.dim, "threads": options.threads, "budget": options.budget}
        answer = run_case("benchmarks.objective", world, case)
        shared = {"W": world, "B": B, "variant": "none"}
        rows += [shared | row for row in ([answer] if isinstance(answer, dict) else answer)]
    return rows


def run_rank(rank: launch.Runtime, case: Row) -> list[Row]:
    """``implementation``, ``seconds``, ``ratio`` to ours, ``error`` and ``cosine`` of each. Collective."""
    B = case["B"]
    b = B // rank.world_size
    own = slice(rank.rank * b, (rank.rank + 1) * b)
    E_BD, labels_B = embeddings(B, case["dim"], 0, str(rank.device)), torch.arange(B, device=rank.device) // 2
    ways = rank_implementations(labels_B, own)
    alone = implementations("none", E_BD, labels_B)
    mine: dict[str, list[float]] = {}
    for name, way in ways.items():
        whole_BD = E_BD.clone().requires_grad_()
        alone["loop and inverse" if name == OURS else LIBRARY](whole_BD).backward()
        gradient_bD = _gradient(way, E_BD[own]).double() / rank.world_size  # DDP takes the mean
        assert whole_BD.grad is not None
        wanted_bD = whole_BD.grad[own].double()
        error = (gradient_bD - wanted_bD).norm() / wanted_bD.norm()
        cosine = (gradient_bD * wanted_bD).sum() / (gradient_bD.norm() * wanted_bD.norm())
        mine[name] = [float(error), 1 - float(cosine)]
    for name, seconds in _fastest_together(ways, E_BD[own], case["budget"]).items():
        mine[name].append(seconds)
    every = collectives.gather_json(mine)
    worst = {name: [max(one[name][i] for one in every) for i in range(3)] for name in ways}
    return [
        {"implementation": name, "seconds": seconds, "ratio": seconds / worst[OURS][2], "error": error,
         "cosine": 1 - off}
        for name, (error, off, seconds) in worst.items()
    ]  # fmt: skip


def rank_implementations(labels_B: torch.Tensor, own: slice) -> dict[str, Implementation]:
    """Each from a rank's own rows to the scalar on which it calls backward under DDP."""
    config = distillation("none")
    ours = distilled(RANKING, config)

    def whole(E_bD: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = ours(E_bD, labels_B).loss
        return loss

    ways: dict[str, Implementation] = {OURS: whole}
    if has_library():
        for name, efficient in ((LIBRARY, False), (EFFICIENT, True)):
            ways[name] = _wrapped(labels_B[own], efficient)
    return ways


def _wrapped(labels_b: torch.Tensor, efficient: bool) -> Implementation:
    from pytorch_metric_learning.utils import distributed

    loss, miner = library_loss()
    loss = distributed.DistributedLossWrapper(loss, efficient=efficient)
    miner = distributed.DistributedMinerWrapper(miner, efficient=efficient)
    return lambda E_bD: loss(E_bD, labels_b, miner(E_bD, labels_b))


def _gradient(way: Implementation, E_bD: torch.Tensor) -> torch.Tensor:
    """The gradient at the rank's own rows."""
    leaf_bD = E_bD.clone().requires_grad_()
    way(leaf_bD).backward()
    if leaf_bD.is_cuda:
        torch.cuda.synchronize()
    assert leaf_bD.grad is not None
    return leaf_bD.grad


def _fastest_together(ways: dict[str, Implementation], E_bD: torch.Tensor, budget: float) -> dict[str, float]:
    """Seconds of each on this rank: the least of as many calls as every rank makes, within a tenth of the budget."""
    best = dict.fromkeys(ways, float("inf"))
    rounds, done, started = 2, 0, time.perf_counter()
    while done < rounds:
        for name, way in ways.items():
            before = time.perf_counter()
            _gradient(way, E_bD)
            best[name] = min(best[name], time.perf_counter() - before)
        done += 1
        if done == 2:
            taken = max(collectives.gather_json((time.perf_counter() - started) / done))
            rounds = max(2, min(ROUNDS, int(budget / 10 / taken)))
    return best


def main(arguments: Sequence[str] | None = None) -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--sizes", type=common.numbers, metavar="B,B,...", help=f"batches (default: {SIZES})")
    parser.add_argument("--worlds", type=common.numbers, metavar="W,W,...", help="ranks to add (default: none)")
    return common.main(parser.parse_args(arguments), run, findings)


if __name__ == "__main__":
    sys.exit(main())
