"""A whole training step by variant of the objective, and where its time goes.

The variants take turns in one process per rank, a block of steps each, so that a machine whose speed drifts slows all
of them down alike. A step's time is a block's divided by its steps, the median over the blocks; its parts are medians
over all steps. Without ``--shards`` one batch of images is made up and taken again and again, so nobody waits for data;
with it, batches come as in a run, with ``--workers`` decoding processes per rank.

    overhead   step time / that of the variant ``none``
    floor      the same if only the teacher's forward pass came on top
    excess     (step - step of ``none``) / teacher's forward pass: 1 if the objective cost nothing

Weak scaling: every rank has ``--batch`` images, whatever the number of ranks.

Legend: b rows of a rank, B rows of the global batch, D embedding dimension, W ranks.
"""

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import common
from benchmarks.common import Row, matmul_flops, run_case
from dist_obdsd import machine
from dist_obdsd.config import Config, parse_config
from dist_obdsd.data import manifest as manifests
from dist_obdsd.data.from_config import classes_from
from dist_obdsd.data.stream import TrainBatch, TrainStream
from dist_obdsd.distributed import collectives, launch
from dist_obdsd.errors import InputError
from dist_obdsd.losses.build import build_objective
from dist_obdsd.models.embedder import build_embedder
from dist_obdsd.models.precision import compile_networks
from dist_obdsd.models.teacher import ProgressiveTeacher
from dist_obdsd.training.strategy import build_strategy
from dist_obdsd.training.train_step import TrainProgress, TrainStep

CASE = ("backbone", "image_size", "batch", "dim", "precision", "compile", "teacher_precision", "threads", "budget",
        "shards", "workers")  # fmt: skip
"""The options that say what is measured."""
VARIANTS = ("none", "psd", "obdsd")
WAIT = "data wait"
PARTS = ("student forward", "teacher", "communication", "objective", "student backward", "optimizer")
WARM_UP, BLOCKS = 3, 5
BLOCK_SECONDS = 1.0
MADE_UP = "made up"
"""In place of shards."""
EPOCHS = 100_000
"""Of a stream, which begins in the middle, at half the ramp, and never comes to its end."""


def run(options: argparse.Namespace) -> list[Row]:
    """A row per number of ranks and variant."""
    rows: list[Row] = []
    if options.shards:
        manifests.load(options.shards)  # complains here, once
    for world in options.worlds or (1, 2):
        case = {name: getattr(options, name) for name in CASE}
        case["trace"] = str(options.trace) if options.trace and not rows else None
        config(case, "none", world)  # likewise
        answer = run_case("benchmarks.step", world, case)
        if isinstance(answer, dict):
            rows.append({"W": world} | answer)
        else:
            rows += answer
    return rows


def findings(rows: list[Row]) -> dict[str, float]:
    """What decides: the overhead of each variant, and its excess over the teacher's forward pass."""
    return {
        f"{what} of {row['variant']} on {row['W']} ranks": row[what]
        for row in rows
        for what in ("overhead", "excess")
        if row.get("variant") in VARIANTS[1:] and what in row
    }


def config(case: dict[str, Any], variant: str, world: int) -> Config:
    """The config of a variant, with the published weights of CUB200 and sharper temperatures.

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
            "shards": str(case["shards"] or MADE_UP),
            "workers": case["workers"],
            "image_size": case["image_size"] or (32 if small else 224),
            "lanes": world,
            **({"channels": 1, "mean": [0.5], "std": [0.5]} if small else {}),
        },
        "batch": {"global_size": case["batch"] * world, "samples_per_class": 2},
        "model": {"backbone": case["backbone"], "embedding_dim": case["dim"], "compile": case["compile"]},
        "distillation": {
            "target": variant,
            "weight": 3,
            "temperature": 0.1,
            "transition_temperature": 0.05,
            "omega": 0.5,
            "teacher_precision": case["teacher_precision"],
        },
        "optim": {"lr": 1e-5},
    }
    return parse_config(raw, "benchmarks.step")


# ---- on a rank ------------------------------------------------------------------------------------------------------


class StepTimer:
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

    def time_calls(self, owner: Any, name: str, part: str, then: Callable[[Any], None] = lambda result: None) -> None:
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


class Batches(AbstractContextManager["Batches"]):
    """Batches from the middle of a run; all variants of a rank share one."""

    classes: Sequence[int]
    """The sorted classes of all labels."""

    def __init__(self, config: Config, rank: launch.Runtime) -> None:
        """Make a batch up, in pinned memory for a GPU, or start to read. Collective.

        Args:
            config: its ``data.shards`` says where images are to be made up.

        Raises:
            InputError: the shards cannot be read or do not fit the batch.
        """
        self._stream: TrainStream | None = None
        B, data, cuda = config.batch.global_size, config.data, rank.device.type == "cuda"
        if data.shards != MADE_UP:
            manifest = manifests.load(data.shards)
            self.classes, _ = classes_from(config, manifest)
            self._stream = TrainStream(
                manifest, self.classes, config, rank.rank, rank.world_size, config.epochs // 2, 0, pinned=cuda
            )
            return
        self.classes = range(B // 2)
        shape = (B // rank.world_size, data.channels, *data.size)
        images_b = torch.randint(0, 256, shape, dtype=torch.uint8)
        images_b = images_b.pin_memory() if cuda else images_b
        self._batch = TrainBatch(config.epochs // 2, 0, images_b, torch.arange(len(images_b)), torch.arange(B) // 2, [])

    def next(self) -> TrainBatch:
        return self._batch if self._stream is None else next(self._stream)

    def __exit__(self, *error: object) -> None:
        if self._stream is not None:
            self._stream.close()


class Variant:
    """A network, its teacher and everything else that a step needs, and the steps that it takes."""

    def __init__(self, config: Config, rank: launch.Runtime, timer: StepTimer, batches: Batches) -> None:
        self.config, self.rank, self.timer, self.batches = config, rank, timer, batches
        student = build_embedder(config, rank.device)
        teacher = ProgressiveTeacher(student) if config.distillation.needs_teacher else None
        objective = build_objective(config, batches.classes, rank.device)
        compile_networks(config, rank, student, teacher)
        self.compiled = student._compiled_call_impl is not None
        strategy = build_strategy(student, config, rank, [])
        strategy.network.train()
        self.parameters = sum(p.numel() for p in student.parameters())
        self.step = TrainStep(config, rank, strategy, teacher, objective, batches.classes)
        self._divide(strategy, objective)
        self.times: list[float] = []
        self.parts: dict[str, list[float]] = defaultdict(list)
        self.flops = self.peak_mib = 0.0

    def _divide(self, strategy: Any, objective: Any) -> None:
        timer = self.timer
        # The gradient reaches the embeddings where the objective's backward ends and the network's begins.
        timer.time_calls(
            strategy, "embed", "student forward", lambda E_bD: E_bD.register_hook(lambda g: timer.mark("objective"))
        )
        if self.step.teacher is not None:
            timer.time_calls(self.step, "teacher", "teacher")
        timer.time_calls(objective, "start_teacher", "objective")
        timer.time_calls(objective, "forward", "objective")
        timer.time_calls(strategy, "_backward", "student backward")
        timer.time_calls(strategy, "_clipped_norm", "optimizer")
        timer.time_calls(strategy, "_take_step", "optimizer")

    def take(self) -> None:
        batch = self.batches.next()
        self.timer.mark(WAIT)
        self.step(batch, TrainProgress(batch.epoch, batch.step, 1), 0.0)  # not the run's first step, which checks more

    def warm_up(self) -> None:
        # The counter sees operations of torch, not what a compiler made of them.
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            self.take()
        self.flops = counter.get_total_flops()
        for _ in range(WARM_UP):
            self.take()
        self.timer.seconds()

    def block(self, steps: int) -> None:
        cuda = self.rank.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(steps):
            self.timer.mark("between")
            self.take()
            self.timer.mark("other")
        parts = self.timer.seconds()
        self.times.append((time.perf_counter() - started) / steps)
        for part in (*[WAIT] * (self.config.data.shards != MADE_UP), *PARTS, "other"):
            self.parts[part].append(parts.get(part, 0.0) / steps)
        if cuda:
            self.peak_mib = torch.cuda.max_memory_allocated() / 2**20

    def row(self, none: "Variant | None", peak: float) -> Row:
        seconds = statistics.median(self.times)
        B = self.config.batch.global_size
        row: Row = {"W": self.rank.world_size, "B": B, "variant": self.config.distillation.target}
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


def run_rank(rank: launch.Runtime, case: dict[str, Any]) -> list[Row]:
    """This rank's part of a case. Collective."""
    if rank.device.type == "cpu":
        machine.tune_malloc()
    timer = StepTimer(rank.device)
    for owner, name in (
        (collectives, "gather_rows"),
        (collectives, "sum_across"),
        (collectives.AsyncAllGather, "wait"),
    ):
        timer.time_calls(owner, name, "communication")
    configs = [config(case, target, rank.world_size) for target in VARIANTS]
    with Batches(configs[0], rank) as batches:
        variants = [Variant(config, rank, timer, batches) for config in configs]
        for variant in variants:
            variant.warm_up()
        started = time.perf_counter()
        variants[0].block(1)
        # Every rank takes the same number of steps, and all blocks together half the budget at most.
        taken = max(collectives.gather_json(time.perf_counter() - started))
        steps = max(1, int(min(BLOCK_SECONDS, case["budget"] / (2 * BLOCKS * len(VARIANTS))) / taken))
        variants[0].times.clear()
        variants[0].parts.clear()
        for _ in range(BLOCKS):
            for variant in variants:
                variant.block(steps)
        peak = matmul_flops(rank.device, torch.bfloat16 if case["precision"] == "bf16" else torch.float32)
        rows = [variant.row(variants[0], peak) for variant in variants]
        if case["trace"]:
            _trace(variants[-1], Path(case["trace"]), rank.is_main)
    return rows


def _trace(variant: Variant, path: Path, writes: bool) -> None:
    """Three steps for chrome://tracing or Perfetto."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * variant.timer.cuda
    with profile(activities=activities) as trace:
        for _ in range(3):
            variant.take()
    if writes:
        trace.export_chrome_trace(str(path))


def parser() -> argparse.ArgumentParser:
    """The arguments; the GPU checks take them, too."""
    parser = common.parser(__doc__)
    parser.add_argument("--worlds", type=common.numbers, default=[1, 2], metavar="W,W,...", help="ranks (1,2)")
    parser.add_argument("--backbone", default="small_cnn", help="model.backbone (default: small_cnn)")
    parser.add_argument("--image-size", type=int, help="pixels (default: 224; 32 for small_cnn)")
    parser.add_argument("--batch", type=int, default=112, help="images of a rank (default: 112)")
    parser.add_argument("--precision", default="float32", help="float32 or bf16 (default: float32)")
    parser.add_argument("--teacher-precision", default="same", help="same or bf16 (default: same)")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--shards", metavar="DIR", help="shards to read (default: made-up images)")
    parser.add_argument("--workers", type=int, default=2, help="decoding processes per rank (default: 2)")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write three steps of obdsd here, for Perfetto")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    return common.main(parser().parse_args(arguments), run, findings)


if __name__ == "__main__":
    sys.exit(main())
