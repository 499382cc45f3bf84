"""``bench step``: a whole training step by arm, where its time goes, and what many GPUs would make of it.

The arms take turns in one process per rank, a block of steps each, so that a machine whose speed drifts slows all of
them down alike. A step's time is a block's divided by its steps, the median over the blocks; its parts are medians over
all steps. Without ``--shards`` one batch of images is made up and taken again and again, so nobody waits for data; with
it, batches come as in a run, with ``--workers`` decoding processes per rank.

    overhead   step time / that of the arm ``none``
    floor      the same if only the teacher's forward pass came on top
    excess     (step - step of ``none``) / teacher's forward pass: 1 if the objective cost nothing

Weak scaling: every rank has ``--batch`` images, whatever the number of ranks.

Legend: b rows of a rank, B rows of the global batch, D embedding dimension, W ranks.
"""

import argparse
import json
import logging
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import projection
from benchmarks.feed import EPOCHS, Feed
from benchmarks.objective import embeddings
from benchmarks.ranks import START_SECONDS, matmul_flops, on_ranks
from benchmarks.report import Row
from dist_obdsd import machine
from dist_obdsd.config import Config, parse_config
from dist_obdsd.data import manifest as manifests
from dist_obdsd.distributed import collectives, launch
from dist_obdsd.errors import InputError
from dist_obdsd.losses.batch_view import BatchView
from dist_obdsd.losses.build import build_objective
from dist_obdsd.models.embedder import build_embedder
from dist_obdsd.models.precision import compile_networks
from dist_obdsd.models.teacher import ProgressiveTeacher
from dist_obdsd.training.strategy import build_strategy
from dist_obdsd.training.train_step import TrainProgress, TrainStep

CASE = ("backbone", "image_size", "batch", "dim", "precision", "compile", "teacher_precision", "threads", "budget",
        "shards", "workers")  # fmt: skip
"""The options that say what is measured."""
ARMS = ("none", "psd", "obdsd")
WAIT = "data wait"
PARTS = ("student forward", "teacher", "communication", "objective", "student backward", "optimizer")
WARM_UP, BLOCKS = 3, 5
BLOCK_SECONDS = 1.0
PLOT: dict[str, Any] = {
    "x": "W",
    "y": "images_per_s",
    "label": lambda row: row["arm"],
    "title": "training steps",
}


def run(options: argparse.Namespace) -> list[Row]:
    """A row per number of ranks and arm; then rows of a projection, from the parts on one rank."""
    rows: list[Row] = []
    if options.shards:
        manifests.load(options.shards)  # complains here, once
    for world in options.worlds or (1, 2):
        case = {name: getattr(options, name) for name in CASE}
        case["trace"] = str(options.trace) if options.trace and not rows else None
        config(case, "none", world)  # likewise
        answer = on_ranks(__name__, world, case, options.budget)
        if isinstance(answer, dict):
            rows.append({"W": world} | answer)
        else:
            rows += answer
    return rows + projection.rows(rows, options)


def findings(rows: list[Row]) -> dict[str, float]:
    """What decides: the overhead of each arm, and its excess over the teacher's forward pass."""
    return {
        f"{what} of {row['arm']} on {row['W']} ranks": row[what]
        for row in rows
        for what in ("overhead", "excess")
        if row.get("arm") in ARMS[1:] and what in row
    }


def config(case: dict[str, Any], arm: str, world: int) -> Config:
    """The config of an arm, with the published weights of CUB200 and sharper temperatures.

    Raises:
        InputError: a backbone, precision or size that does not fit.
    """
    if case["batch"] % 2:
        raise InputError(f"--batch is {case['batch']}; give an even number, since a batch is made of pairs")
    small = case["backbone"] == "small_cnn"
    raw = {
        "name": "bench",
        "epochs": EPOCHS,
        "precision": case["precision"],
        "data": {
            "shards": str(case["shards"] or ""),
            "workers": case["workers"],
            "image_size": case["image_size"] or (32 if small else 224),
            "lanes": world,
            **({"channels": 1, "mean": [0.5], "std": [0.5]} if small else {}),
        },
        "batch": {"global_size": case["batch"] * world, "samples_per_class": 2},
        "model": {"backbone": case["backbone"], "embedding_dim": case["dim"], "compile": case["compile"]},
        "distillation": {
            "target": arm,
            "weight": 3,
            "temperature": 0.1,
            "transition_temperature": 0.05,
            "omega": 0.5,
            "teacher_precision": case["teacher_precision"],
        },
        "optim": {"lr": 1e-5},
    }
    return parse_config(raw, "bench step")


# ---- on a rank ------------------------------------------------------------------------------------------------------


class Split:
    """Where a step's time goes: marks between its parts, on the host's clock or, for a GPU, in its stream."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def mark(self, ended: str) -> None:
        """Note that the part ``ended`` ends here."""
        moment: Any = time.perf_counter()
        if self.cuda:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self._marks.append((ended, moment))

    def around(self, owner: Any, name: str, part: str, then: Callable[[Any], None] = lambda result: None) -> None:
        """Let the calls of a function or method count as ``part``."""
        inner = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.mark("other")
            result = inner(*args, **kwargs)
            self.mark(part)
            then(result)
            return result

        setattr(owner, name, timed)

    def seconds(self) -> dict[str, float]:
        """The parts since the last call. Waits for a GPU."""
        if self.cuda:
            torch.cuda.synchronize()
        parts: dict[str, float] = defaultdict(float)
        for (_, before), (part, after) in zip(self._marks, self._marks[1:], strict=False):
            parts[part] += before.elapsed_time(after) / 1000 if self.cuda else after - before
        self._marks.clear()
        return parts


class Arm:
    """A network, its teacher and everything else that a step needs, and the steps that it takes."""

    def __init__(self, config: Config, rank: launch.Runtime, split: Split, feed: Feed) -> None:
        self.config, self.rank, self.split, self.feed = config, rank, split, feed
        student = build_embedder(config, rank.device)
        teacher = ProgressiveTeacher(student) if config.distillation.needs_teacher else None
        objective = build_objective(config, feed.classes, rank.device)
        compile_networks(config, rank, student, teacher)
        self.compiled = student._compiled_call_impl is not None
        strategy = build_strategy(student, config, rank, [])
        strategy.network.train()
        self.parameters = sum(p.numel() for p in student.parameters())
        self.step = TrainStep(config, rank, strategy, teacher, objective, feed.classes)
        self._divide(strategy, objective)
        self.times: list[float] = []
        self.parts: dict[str, list[float]] = defaultdict(list)
        self.flops = self.peak_mib = 0.0

    def _divide(self, strategy: Any, objective: Any) -> None:
        split = self.split
        # The gradient reaches the embeddings where the objective's backward ends and the network's begins.
        split.around(
            strategy, "embed", "student forward", lambda E_bD: E_bD.register_hook(lambda g: split.mark("objective"))
        )
        if self.step.teacher is not None:
            split.around(self.step, "teacher", "teacher")
        split.around(objective, "start_async", "objective")
        split.around(objective, "terms", "objective")
        split.around(objective, "loss", "objective")
        split.around(strategy, "_backward", "student backward")
        split.around(strategy, "_clipped_norm", "optimizer")
        split.around(strategy, "_take_step", "optimizer")

    def take(self) -> None:
        batch = self.feed()
        self.split.mark(WAIT)
        self.step(batch, TrainProgress(batch.epoch, batch.step, 1), 0.0)  # not the run's first step, which checks more

    def warm_up(self) -> None:
        # The counter sees operations of torch, not what a compiler made of them.
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            self.take()
        self.flops = counter.get_total_flops()
        for _ in range(WARM_UP):
            self.take()
        self.split.seconds()

    def block(self, steps: int) -> None:
        cuda = self.rank.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(steps):
            self.split.mark("between")
            self.take()
            self.split.mark("other")
        parts = self.split.seconds()
        self.times.append((time.perf_counter() - started) / steps)
        for part in (*[WAIT] * bool(self.config.data.shards), *PARTS, "other"):
            self.parts[part].append(parts.get(part, 0.0) / steps)
        if cuda:
            self.peak_mib = torch.cuda.max_memory_allocated() / 2**20

    def row(self, none: "Arm | None", peak: float) -> Row:
        seconds = statistics.median(self.times)
        B = self.config.batch.global_size
        row: Row = {"W": self.rank.world_size, "B": B, "arm": self.config.distillation.target}
        # What came of a wish: a machine that cannot do it goes on without.
        if self.config.model.compile:
            row["compiled"] = self.compiled
        row |= {"images_per_s": B / seconds, "ms": 1000 * seconds}
        row |= {part: 1000 * statistics.median(values) for part, values in self.parts.items()}
        if none is not None:
            base, teacher = 1000 * statistics.median(none.times), row["teacher"]
            row["overhead"] = row["ms"] / base
            if teacher:
                row |= {"floor": 1 + teacher / base, "excess": (row["ms"] - base) / teacher}
        row["mfu"] = self.flops / seconds / peak
        return row | ({"peak_mib": self.peak_mib} if self.peak_mib else {})


def _rank(case: dict[str, Any]) -> None:
    """This rank's part of a case; rank 0 prints the rows."""
    seconds = START_SECONDS + 2 * case["budget"]
    with launch.start(threads=case["threads"], timeout_seconds=seconds) as rank, ExitStack() as stack:
        if rank.device.type == "cpu":
            machine.tune_malloc()
        split = Split(rank.device)
        for owner, name in (
            (collectives, "gather_rows"),
            (collectives, "sum_across"),
            (collectives.AsyncAllGather, "wait"),
        ):
            split.around(owner, name, "communication")
        configs = [config(case, arm, rank.world_size) for arm in ARMS]
        feed = stack.enter_context(Feed(configs[0], rank))
        arms = [Arm(config, rank, split, feed) for config in configs]
        for arm in arms:
            arm.warm_up()
        started = time.perf_counter()
        arms[0].block(1)
        # Every rank takes the same number of steps, and all blocks together half the budget at most.
        taken = max(collectives.gather_json(time.perf_counter() - started))
        steps = max(1, int(min(BLOCK_SECONDS, case["budget"] / (2 * BLOCKS * len(ARMS))) / taken))
        arms[0].times.clear()
        arms[0].parts.clear()
        for _ in range(BLOCKS):
            for arm in arms:
                arm.block(steps)
        peak = matmul_flops(rank.device, torch.bfloat16 if case["precision"] == "bf16" else torch.float32)
        rows = [arm.row(arms[0], peak) for arm in arms]
        if case["trace"]:
            _trace(arms[-1], Path(case["trace"]), rank.is_main)
        if rank.world_size == 1:
            rows[-1][projection.MEASURED] = {
                "parameters": arms[-1].parameters,
                "objective": _objective_alone(arms[-1], case["budget"] / 4),
            }
        if rank.is_main:
            print(json.dumps(rows))


def _trace(arm: Arm, path: Path, writes: bool) -> None:
    """Three steps for chrome://tracing or Perfetto."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * arm.split.cuda
    with profile(activities=activities) as trace:
        for _ in range(3):
            arm.take()
    if writes:
        trace.export_chrome_trace(str(path))


def _objective_alone(arm: Arm, budget: float) -> list[tuple[int, float]]:
    """(B, seconds) of one rank's objective, forward and backward, for ever larger batches of which it has b rows."""
    objective, device = arm.step.objective, arm.rank.device
    b, found = arm.config.batch.global_size, []
    for W in projection.WORLDS:
        B = b * W
        E_BD, T_BD = (embeddings(B, arm.config.model.embedding_dim, seed, str(device)) for seed in (0, 1))
        labels_B = torch.arange(B, device=device) // 2
        best = float("inf")
        for _ in range(2):
            started = time.perf_counter()
            E_bD = E_BD[:b].clone().requires_grad_()
            # By the step's own road, on which a GPU looks at the diffusion later.
            gathering = collectives.AsyncAllGather(T_BD)
            pending = objective.start_async(gathering, slice(0, b)) if arm.step.looks_later else None
            terms = objective.terms(BatchView(E_bD, torch.cat([E_bD, E_BD[b:]]), labels_B, 0, 0), T_BD, pending)
            objective.loss(terms, {name: term.count for name, term in terms.items()}, 1, 0.5).backward()
            if arm.split.cuda:
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - started)
        found.append((B, best))
        if 60 * best > budget:  # eight times the batch takes up to 64 times as long
            break
    return found


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # to stderr, where a rank says what does not work
    _rank(json.loads(sys.argv[1]))
