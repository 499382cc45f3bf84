"""A whole training step by variant of the objective, and where its time goes.

The variants take turns in one process per rank, a block of steps each, so that a machine whose speed drifts slows all
of them down alike. The quickest block counts: on one rank of a CPU by the process's own time, which other processes on
the machine do not lengthen, else by the clock. One batch of images is made up and taken again and again, so nobody
waits for data. The student's embeddings are spread out as a trained network's are, with images of one class together:
those of fresh weights are all but the same, and no diffusion would be sharp on them.

    overhead   step time / that of the variant ``none``
    excess     (step - step of ``none``) / teacher's forward pass: 1 if the objective cost nothing
    added      the same from the objective's own parts, which other work on the machine disturbs less

Weak scaling: every rank has ``--batch`` images, whatever the number of ranks.

Legend: b rows of a rank, B rows of the global batch, D embedding dimension, W ranks.
"""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import common
from benchmarks.common import Row, run_case
from dist_obdsd import machine
from dist_obdsd.config import Config, parse_config
from dist_obdsd.data.stream import TrainBatch
from dist_obdsd.distributed import collectives, launch
from dist_obdsd.errors import InputError
from dist_obdsd.losses.build import build_objective
from dist_obdsd.models.embedder import build_embedder
from dist_obdsd.models.precision import compile_networks
from dist_obdsd.models.teacher import ProgressiveTeacher
from dist_obdsd.training.strategy import build_strategy
from dist_obdsd.training.train_step import TrainProgress, TrainStep

CASE = ("backbone", "image_size", "batch", "dim", "precision", "compile", "teacher_precision", "threads", "budget",
        "temperatures")  # fmt: skip
"""The options that say what is measured."""
PARTS = ("student forward", "teacher", "communication", "objective", "student backward", "optimizer")
WARM_UP, BLOCKS = 3, 7
BLOCK_SECONDS = 1.0


def variants(temperatures: Sequence[float]) -> list[str]:
    """Names of what is compared: targets, ``obdsd`` once at every transition temperature."""
    return ["none", "psd", *(f"obdsd {temperature:g}" for temperature in temperatures)]


def run(options: argparse.Namespace) -> list[Row]:
    """A row per number of ranks and variant."""
    rows: list[Row] = []
    for world in options.worlds:
        case = {name: getattr(options, name) for name in CASE}
        case["trace"] = str(options.trace) if options.trace and not rows else None
        config(case, "none", world)  # complains here, once
        rows += [{"W": world} | row for row in run_case("benchmarks.step", world, case)]
    return rows


def findings(rows: list[Row]) -> dict[str, float]:
    """What decides: the overhead of each variant, and its excess over the teacher's forward pass."""
    return {
        f"{what} of {row['variant']} on {row['W']} ranks": row[what]
        for row in rows
        for what in ("overhead", "excess", "added")
        if what in row and row["variant"] != "none"
    }


def config(case: dict[str, Any], variant: str, world: int) -> Config:
    """The config of a variant, with SOP's omega.

    Raises:
        InputError: a backbone, precision or size that does not fit.
    """
    if case["batch"] % 2:
        raise InputError(f"--batch is {case['batch']}; give an even number, since a batch is made of pairs")
    small, (target, _, temperature) = case["backbone"] == "small_cnn", variant.partition(" ")
    raw = {
        "name": "bench",
        "epochs": 2,
        "precision": case["precision"],
        "data": {
            "shards": "made up",
            "image_size": case["image_size"] or (32 if small else 224),
            "lanes": world,
            **({"channels": 1, "mean": [0.5], "std": [0.5]} if small else {}),
        },
        "batch": {"global_size": case["batch"] * world, "samples_per_class": 2},
        "model": {"backbone": case["backbone"], "embedding_dim": case["dim"], "compile": case["compile"]},
        "distillation": {
            "target": target,
            "weight": 3,
            "temperature": 0.1,
            "transition_temperature": float(temperature or 1),
            "omega": 0.5,
            "teacher_precision": case["teacher_precision"],
        },
        "optim": {"lr": 1e-5},
    }
    return parse_config(raw, "benchmarks.step")


def made_up_images(config: Config, seed: int = 0) -> torch.Tensor:
    """uint8 [B, C, s, s]: a pattern for each pair of one class, and noise."""
    draw, data, B = torch.Generator().manual_seed(seed), config.data, config.batch.global_size
    patterns = torch.rand(B // 2, data.channels, 4, 4, generator=draw)
    shift = torch.rand(B // 2, data.channels, 1, 1, generator=draw)
    patterns = (0.5 * patterns + 0.5 * shift).repeat_interleave(2, 0)
    images = nn.functional.interpolate(patterns, size=(data.image_size,) * 2)
    return (255 * (images + 0.1 * torch.randn(images.shape, generator=draw)).clamp(0, 1)).byte()


@torch.no_grad()
def spread(network: nn.Module, images_B: torch.Tensor) -> None:
    """Let a fresh network's embeddings of a batch point in all directions, as a trained one's do.

    BatchNorm gets its statistics, and the last bias its value, from this batch.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.train().momentum = None  # takes over the statistics of the one batch
    inputs: list[torch.Tensor] = []
    hook = network.head.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    network(images_B)
    for norm in norms:
        norm.eval()
    network(images_B)
    hook.remove()
    network.head.bias.copy_(-network.head.weight @ inputs[-1].mean(0))


# ---- on a rank ----


class StepTimer:
    """Where a step's time goes: marks between its parts, on the host's clock or, for a GPU, in its stream."""

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.cuda, self.clock = device.type == "cuda", clock
        self._marks: list[tuple[str, Any]] = []
        self._within = ["other"]

    def mark(self, ended: str) -> None:
        """Note that a piece of the part ``ended`` ends here."""
        moment: Any = self.clock()
        if self.cuda:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self._marks.append((ended, moment))

    def time_calls(self, owner: Any, name: str, part: str, then: Callable[[Any], None] = lambda result: None) -> None:
        """Let the calls of a function or method count as ``part``, but for timed calls inside."""
        inner = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.mark(self._within[-1])
            self._within.append(part)
            result = inner(*args, **kwargs)
            self.mark(self._within.pop())
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


class Variant:
    """A network, its teacher and everything else that a step needs, and the steps that it takes."""

    def __init__(self, name: str, config: Config, rank: launch.Runtime, timer: StepTimer) -> None:
        self.name, self.config, self.rank, self.timer = name, config, rank, timer
        B = config.batch.global_size
        b, first, classes = B // rank.world_size, rank.rank * B // rank.world_size, range(B // 2)
        images_B = made_up_images(config)
        images_b = images_B[first : first + b]
        images_b = images_b.pin_memory() if timer.cuda else images_b
        student = build_embedder(config, rank.device)
        spread(student, images_B[: min(B, 448)].to(rank.device))
        teacher = ProgressiveTeacher(student) if config.distillation.needs_teacher else None
        objective = build_objective(config, classes, rank.device)
        compile_networks(config, rank, student, teacher)
        self.compiled = student._compiled_call_impl is not None
        strategy = build_strategy(student, config, rank, [])
        strategy.network.train()
        self.step = TrainStep(config, rank, strategy, teacher, objective, classes)
        self.batch = TrainBatch(1, 0, images_b, torch.arange(b), torch.arange(B) // 2)
        self.times, self.parts, self.peak_mib = list[float](), list[dict[str, float]](), 0.0
        # The gradient reaches the embeddings where the objective's backward ends and the network's begins.
        timer.time_calls(
            strategy, "embed", "student forward", lambda E_bD: E_bD.register_hook(lambda g: timer.mark("objective"))
        )
        if teacher is not None:
            timer.time_calls(teacher, "forward", "teacher")
        for owner, method, part in (
            (objective, "start_teacher", "objective"), (objective, "forward", "objective"),
            (strategy, "_backward", "student backward"), (strategy, "_clipped_norm", "optimizer"),
            (strategy, "_take_step", "optimizer"),
        ):  # fmt: skip
            timer.time_calls(owner, method, part)

    def take(self) -> None:
        self.step(self.batch, TrainProgress(1, 0, 1), 0.0)  # not the run's first step, which checks more

    def block(self, steps: int) -> None:
        if self.timer.cuda:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        self.timer.seconds()
        started = self.timer.clock()
        for _ in range(steps):
            self.timer.mark("other")
            self.take()
            self.timer.mark("other")
        parts = self.timer.seconds()
        self.times.append((self.timer.clock() - started) / steps)
        self.parts.append({part: parts.get(part, 0.0) / steps for part in (*PARTS, "other")})
        if self.timer.cuda:
            self.peak_mib = torch.cuda.max_memory_allocated() / 2**20

    def row(self, none: "Variant") -> Row:
        seconds, B = min(self.times), self.config.batch.global_size
        row: Row = {"B": B, "variant": self.name}
        # What came of a wish: a machine that cannot do it goes on without.
        if self.config.model.compile:
            row["compiled"] = self.compiled
        row |= {"images_per_s": B / seconds, "ms": 1000 * seconds}
        row |= {part: 1000 * value for part, value in self.parts[self.times.index(seconds)].items()}
        base, teacher = 1000 * min(none.times), row["teacher"]
        row["overhead"] = row["ms"] / base
        if teacher:
            own, without = (min(part["objective"] + part["communication"] for part in v.parts) for v in (self, none))
            added = 1 + (own - without) / min(part["teacher"] for part in self.parts)
            row |= {"excess": (row["ms"] - base) / teacher, "added": added}
        return row | ({"peak_mib": self.peak_mib} if self.peak_mib else {})


def run_rank(rank: launch.Runtime, case: dict[str, Any]) -> list[Row]:
    """This rank's part of a case. Collective."""
    if rank.device.type == "cpu":
        machine.tune_malloc()
    alone = rank.device.type == "cpu" and rank.world_size == case["threads"] == 1
    timer = StepTimer(rank.device, time.process_time if alone else time.perf_counter)
    for owner, name in (
        (collectives, "gather_rows"),
        (collectives, "sum_across"),
        (collectives.AsyncAllGather, "wait"),
    ):
        timer.time_calls(owner, name, "communication")
    names = variants(case["temperatures"])
    every = [Variant(name, config(case, name, rank.world_size), rank, timer) for name in names]
    for variant in every:
        for _ in range(WARM_UP):
            variant.take()
    started = time.perf_counter()
    every[0].block(1)
    # Every rank takes the same number of steps, and all blocks together half the budget at most.
    taken = max(collectives.gather_json(time.perf_counter() - started))
    steps = max(1, int(min(BLOCK_SECONDS, case["budget"] / (2 * BLOCKS * len(every))) / taken))
    every[0].times.clear()
    every[0].parts.clear()
    # The process's own time needs no long blocks, and short ones are more often undisturbed.
    for _ in range(BLOCKS * steps if alone else BLOCKS):
        for variant in every:
            variant.block(1 if alone else steps)
    if case["trace"]:
        _trace(every[-1], Path(case["trace"]), rank.is_main)
    return [variant.row(every[0]) for variant in every]


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
    parser = common.parser(__doc__, worlds=(1, 2))
    parser.add_argument("--backbone", default="small_cnn", help="model.backbone (default: small_cnn)")
    parser.add_argument("--image-size", type=int, help="pixels (default: 224; 32 for small_cnn)")
    parser.add_argument("--batch", type=int, default=112, help="images of a rank (default: 112)")
    parser.add_argument("--precision", default="float32", help="float32 or bf16 (default: float32)")
    parser.add_argument("--teacher-precision", default="same", help="same or bf16 (default: same)")
    parser.add_argument("--temperatures", type=lambda text: [float(x) for x in text.split(",")],
                        default=[1.0, 0.05, 0.005], metavar="T,T,...",
                        help="transition temperatures of obdsd (default: 1,0.05,0.005)")  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write three steps of the last variant for Perfetto")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    return common.main(parser().parse_args(arguments), run, findings)


if __name__ == "__main__":
    sys.exit(main())
