"""The ranking loss over several ranks, beside pytorch-metric-learning's distributed wrapper: time and gradient.

Part of ``bench objective``. Every rank has its rows of one batch; a call is what a training step adds to the network:
all messages, the loss and its backward. The implementations take turns, call by call. A call ends on a rank when its
part is done; the fastest one counts, on the slowest rank.

    error    of the gradient at a rank's own rows, as DDP's mean over the ranks makes it, beside the same
             implementation's in one process with the whole batch; relative to that one's norm, on the worst rank
    cosine   of the angle between the two, on the worst rank: whether more than the length is off

Legend: b rows of a rank, B rows of the batch, D embedding dimension, W ranks.
"""

import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import objective
from benchmarks.ranks import START_SECONDS, on_ranks
from benchmarks.report import Row
from dist_obdsd.distributed import collectives, launch
from dist_obdsd.errors import InputError
from dist_obdsd.losses.batch_view import BatchView
from dist_obdsd.losses.build import distilled

OURS, THEIRS = "dist-obdsd", objective.PEER
EFFICIENT = f"{THEIRS}, efficient"
"""Each rank has only its own rows as anchors: quicker, and another gradient, W times as long if pairs share a rank."""
Way = Callable[[torch.Tensor], torch.Tensor]


def check(sizes: Sequence[int], worlds: Sequence[int]) -> None:
    """See that every number of ranks can share every batch.

    Raises:
        InputError: not equally.
    """
    for B, W in itertools.product(sizes, worlds):
        if B % W:
            raise InputError(f"--sizes has {B}, which {W} ranks cannot share equally; give multiples of {W}")


def run(sizes: Sequence[int], world: int, options: Any) -> list[Row]:
    """A row per batch size and implementation.

    Raises:
        RunError: a rank failed, with what it said.
    """
    rows: list[Row] = []
    for B in sizes:
        case = {"B": B, "dim": options.dim, "threads": options.threads, "budget": options.budget}
        answer = on_ranks(__name__, world, case, options.budget)
        about = {"W": world, "B": B, "arm": "none"}
        rows += [about | row for row in ([answer] if isinstance(answer, dict) else answer)]
    return rows


def _rank(case: dict[str, Any]) -> None:
    """This rank's part of a case; rank 0 prints the rows."""
    with launch.start(threads=case["threads"], timeout_seconds=START_SECONDS + 2 * case["budget"]) as rank:
        rows = measure(rank, case["B"], case["dim"], case["budget"])
        if rank.is_main:
            print(json.dumps(rows))


def measure(rank: launch.Runtime, B: int, dim: int, budget: float) -> list[Row]:
    """``implementation``, ``seconds``, ``ratio`` to ours, ``error`` and ``cosine`` of each. Collective."""
    b = B // rank.world_size
    own = slice(rank.rank * b, (rank.rank + 1) * b)
    E_BD, labels_B = objective.embeddings(B, dim, 0, str(rank.device)), torch.arange(B, device=rank.device) // 2
    ways = implementations(labels_B, own)
    alone = objective.implementations("none", E_BD, labels_B)
    mine: dict[str, list[float]] = {}
    for name, way in ways.items():
        whole_BD = E_BD.clone().requires_grad_()
        alone[OURS if name == OURS else THEIRS](whole_BD).backward()
        gradient_bD = _call(way, E_BD[own]).double() / rank.world_size  # DDP takes the mean
        assert whole_BD.grad is not None
        wanted_bD = whole_BD.grad[own].double()
        error = (gradient_bD - wanted_bD).norm() / wanted_bD.norm()
        cosine = (gradient_bD * wanted_bD).sum() / (gradient_bD.norm() * wanted_bD.norm())
        mine[name] = [float(error), 1 - float(cosine)]
    for name, seconds in _fastest(ways, E_BD[own], budget).items():
        mine[name].append(seconds)
    every = collectives.gather_json(mine)
    worst = {name: [max(one[name][i] for one in every) for i in range(3)] for name in ways}
    return [
        {"implementation": name, "seconds": seconds, "ratio": seconds / worst[OURS][2], "error": error,
         "cosine": 1 - off}
        for name, (error, off, seconds) in worst.items()
    ]  # fmt: skip


def implementations(labels_B: torch.Tensor, own: slice) -> dict[str, Way]:
    """Each from a rank's own rows to the scalar on which it calls backward under DDP."""
    config = objective.distillation("none")
    ours = distilled(objective.RANKING, config)
    W = len(labels_B) // (own.stop - own.start)

    def whole(E_bD: torch.Tensor) -> torch.Tensor:
        E_BD = collectives.gather_rows(E_bD, check_sizes=False)
        terms = ours.terms(BatchView(E_bD, E_BD, labels_B, own.start))
        numbers = [number.detach() for term in terms.values() for number in (term.sum, term.count)]
        counts = collectives.sum_across(torch.stack(numbers))[1::2]  # the one small message of a step
        return ours.loss(terms, dict(zip(terms, counts, strict=True)), W, 1.0)

    ways: dict[str, Way] = {OURS: whole}
    if objective.has_peer():
        for name, efficient in ((THEIRS, False), (EFFICIENT, True)):
            ways[name] = _wrapped(labels_B[own], efficient)
    return ways


def _wrapped(labels_b: torch.Tensor, efficient: bool) -> Way:
    from pytorch_metric_learning.utils import distributed

    loss, miner = objective.peer()
    loss = distributed.DistributedLossWrapper(loss, efficient=efficient)
    miner = distributed.DistributedMinerWrapper(miner, efficient=efficient)
    return lambda E_bD: loss(E_bD, labels_b, miner(E_bD, labels_b))


def _call(way: Way, E_bD: torch.Tensor) -> torch.Tensor:
    """The gradient at the rank's own rows."""
    leaf_bD = E_bD.clone().requires_grad_()
    way(leaf_bD).backward()
    if leaf_bD.is_cuda:
        torch.cuda.synchronize()
    assert leaf_bD.grad is not None
    return leaf_bD.grad


def _fastest(ways: dict[str, Way], E_bD: torch.Tensor, budget: float) -> dict[str, float]:
    """Seconds of each on this rank: the least of as many calls as every rank makes, within a tenth of the budget."""
    best = dict.fromkeys(ways, float("inf"))
    rounds, done, started = 2, 0, time.perf_counter()
    while done < rounds:
        for name, way in ways.items():
            before = time.perf_counter()
            _call(way, E_bD)
            best[name] = min(best[name], time.perf_counter() - before)
        done += 1
        if done == 2:
            taken = max(collectives.gather_json((time.perf_counter() - started) / done))
            rounds = max(2, min(objective.ROUNDS, int(budget / 10 / taken)))
    return best


if __name__ == "__main__":
    _rank(json.loads(sys.argv[1]))
