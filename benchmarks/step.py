"""A whole training step by variant of the objective, and where its time goes.

The variants take turns in one process per rank, a block of steps each, so that a machine whose speed drifts slows all
of them down alike. The quickest block counts: on one rank of a CPU by the process's own time, which other processes on
the machine do not lengthen, else by the clock. One batch of images is made up and taken again and again, so nobody
waits for data. The student's embeddings are spread out as a trained network's are, with images of one class together:
those of fresh weights are all but the same, and no diffusion would be sharp on them. Settings say what is measured:
``model.backbone=resnet18 data.image_size=64 precision=bf16 model.compile=true``.

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
from torch.profiler import profile

from benchmarks import common
from benchmarks.common import Row
from dist_obdsd import machine
from dist_obdsd.config import Config, override_config, parse_config
from dist_obdsd.data.stream import TrainBatch
from dist_obdsd.distributed import collectives, launch
from dist_obdsd.errors import InputError
from dist_obdsd.losses.build import build_objective
from dist_obdsd.losses.obdsd import OBDSDLoss
from dist_obdsd.models.embedder import build_embedder
from dist_obdsd.models.precision import compile_networks
from dist_obdsd.models.teacher import ProgressiveTeacher
from dist_obdsd.training.strategy import build_strategy
from dist_obdsd.training.train_step import TrainProgress, TrainStep

PARTS = ("student forward", "teacher", "communication", "objective", "student backward", "optimizer")
WARM_UP, BLOCKS = 3, 7
BLOCK_SECONDS = 1.0


def run(options: argparse.Namespace) -> list[Row]:
    """A row per number of ranks and variant."""
    if options.batch % 2:
        raise InputError(f"--batch is {options.batch}; give an even number, since a batch is made of pairs")
    for W in options.worlds:
        variants(vars(options), W)  # complains here, once
    return [row for W in options.worlds for row in common.run_case(run_rank, W, vars(options), W=W)]


def findings(rows: list[Row]) -> dict[str, float]:
    """What decides: the overhead of each variant, and its excess over the teacher's forward pass."""
    return {
        f"{what} of {row['variant']} on {row['W']} ranks": row[what]
        for row in rows
        for what in ("overhead", "excess", "added")
        if what in row and row["variant"] != "none"
    }


def variants(case: Row, world: int) -> dict[str, Config]:
    """The configs that are compared, by name: targets, ``obdsd`` once at every transition temperature."""
    wanted = {"none": ["none", 1.0], "psd": ["psd", 1.0]} | {f"obdsd {t:g}": ["obdsd", t] for t in case["temperatures"]}
    return {
        name: build_config(
            case["batch"] * world, f"data.lanes={world}", f"distillation.target={target}",
            f"distillation.transition_temperature={temperature}", *case["settings"],
        )
        for name, (target, temperature) in wanted.items()
    }  # fmt: skip


# ---- what takes a step, for the other benchmarks and the GPU checks, too ----


def build_config(B: int, *settings: str) -> Config:
    """The config of a global batch of made-up images in pairs, as ``KEY=VALUE`` change it.

    Raises:
        InputError: a setting that does not fit.
    """
    backbone = override_config({"model": {"backbone": "small_cnn"}}, settings)["model"]["backbone"]
    small = {"image_size": 32, "channels": 1, "mean": [0.5], "std": [0.5]}
    raw = {
        "name": "bench",
        "epochs": 2,
        "data": {"shards": "made up", "lanes": 1} | (small if backbone == "small_cnn" else {"image_size": 224}),
        "batch": {"global_size": B, "samples_per_class": 2},
        "model": {"backbone": backbone, "embedding_dim": 128},
        "distillation": {"weight": 3, "temperature": 0.1},
        "optim": {"lr": 1e-5},
    }
    return parse_config(override_config(raw, settings), "the benchmark")


def build_step(
    config: Config, rank: launch.Runtime, student: nn.Module, objective: OBDSDLoss | None = None
) -> TrainStep:
    """Build all that a step needs beside the student, of which the teacher is a copy."""
    classes = range(config.batch.global_size // 2)
    teacher = ProgressiveTeacher(student) if config.distillation.needs_teacher else None
    objective = objective or build_objective(config, classes, rank.device)
    compile_networks(config, rank, student, teacher)
    strategy = build_strategy(student, config, rank, list(objective.ranking.named_parameters()))
    if teacher is not None:
        strategy.shard(teacher.network, teacher=True)
    strategy.network.train()
    return TrainStep(config, rank, strategy, teacher, objective, classes)


def made_up_batch(config: Config, rank: launch.Runtime, seed: int = 0, step: int = 0) -> TrainBatch:
    """This rank's part of a batch of the second epoch, in memory that a GPU can read while the host goes on."""
    B = config.batch.global_size
    b, labels_B = B // rank.world_size, torch.arange(B) // 2
    images_b = made_up_images(config, seed)[rank.rank * b : (rank.rank + 1) * b]
    if rank.device.type == "cuda":
        images_b, labels_B = images_b.pin_memory(), labels_B.pin_memory()
    return TrainBatch(1, step, images_b, torch.arange(b), labels_B)


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
    """A training step, and the milliseconds that it and its parts took in each block of steps."""

    def __init__(self, name: str, config: Config, rank: launch.Runtime, timer: StepTimer) -> None:
        self.name, self.config, self.timer = name, config, timer
        student = build_embedder(config, rank.device)
        spread(student, made_up_images(config)[:448].to(rank.device))
        self.step, self.batch = build_step(config, rank, student), made_up_batch(config, rank)
        self.compiled = student._compiled_call_impl is not None
        self.blocks: list[dict[str, float]] = []
        strategy, objective = self.step.strategy, self.step.objective
        # The gradient reaches the embeddings where the objective's backward ends and the network's begins.
        timer.time_calls(
            strategy, "embed", "student forward", lambda E_bD: E_bD.register_hook(lambda g: timer.mark("objective"))
        )
        if self.step.teacher is not None:
            timer.time_calls(self.step.teacher, "forward", "teacher")
        for owner, method, part in (
            (objective, "start_teacher", "objective"), (objective, "forward", "objective"),
            (strategy, "_backward", "student backward"), (strategy, "_clipped_norm", "optimizer"),
            (strategy, "_take_step", "optimizer"),
        ):  # fmt: skip
            timer.time_calls(owner, method, part)

    def take(self) -> None:
        self.step(self.batch, TrainProgress(1, 0, 1), 0.0)  # not the run's first step, which checks more

    def block(self, steps: int) -> dict[str, float]:
        self.timer.seconds()  # forgets what was before
        if self.timer.cuda:
            torch.cuda.reset_peak_memory_stats()
        started = self.timer.clock()
        self.timer.mark("other")
        for _ in range(steps):
            self.take()
        self.timer.mark("other")
        parts = self.timer.seconds()
        seconds = {"ms": self.timer.clock() - started} | {part: parts[part] for part in (*PARTS, "other")}
        found = {name: 1000 * value / steps for name, value in seconds.items()}
        return found | ({"peak_mib": torch.cuda.max_memory_allocated() / 2**20} if self.timer.cuda else {})

    def row(self, none: "Variant") -> Row:
        best, base = (min(variant.blocks, key=lambda block: block["ms"]) for variant in (self, none))
        B = self.config.batch.global_size
        row: Row = {"B": B, "variant": self.name, "images_per_s": 1000 * B / best["ms"]} | best
        row["overhead"] = best["ms"] / base["ms"]
        if best["teacher"]:
            own, without = (
                min(block["objective"] + block["communication"] for block in v.blocks) for v in (self, none)
            )
            row["excess"] = (best["ms"] - base["ms"]) / best["teacher"]
            row["added"] = 1 + (own - without) / min(block["teacher"] for block in self.blocks)
        # What came of a wish: a machine that cannot do it goes on without.
        return row | ({"compiled": self.compiled} if self.config.model.compile else {})


def run_rank(rank: launch.Runtime, case: dict[str, Any]) -> list[Row]:
    """This rank's part of a case. Collective."""
    if rank.device.type == "cpu":
        machine.tune_malloc()
    alone = rank.device.type == "cpu" and rank.world_size == case["threads"] == 1
    timer = StepTimer(rank.device, time.process_time if alone else time.perf_counter)
    messages = ((collectives, "gather_rows"), (collectives, "sum_across"), (collectives.AsyncAllGather, "wait"))
    for owner, name in messages:
        timer.time_calls(owner, name, "communication")
    every = [Variant(name, config, rank, timer) for name, config in variants(case, rank.world_size).items()]
    for variant in every:
        for _ in range(WARM_UP):
            variant.take()
    # Every rank takes the same number of steps, and all blocks together half the budget at most.
    seconds = max(collectives.gather_json(every[0].block(1)["ms"])) / 1000
    steps = max(1, int(min(BLOCK_SECONDS, case["budget"] / (2 * BLOCKS * len(every))) / seconds))
    # The process's own time needs no long blocks, and short ones are more often undisturbed.
    for _ in range(BLOCKS * steps if alone else BLOCKS):
        for variant in every:
            variant.blocks.append(variant.block(1 if alone else steps))
    if case["trace"]:
        with profile() as trace:
            for _ in range(3):
                every[-1].take()
        if rank.is_main:
            trace.export_chrome_trace(str(case["trace"]))
    return [variant.row(every[0]) for variant in every]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = common.parser(__doc__, worlds=[1, 2], batch=112, temperatures=[1, 0.05, 0.005], budget=120)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings, such as model.backbone=resnet50")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write three steps of the last variant for Perfetto")
    return common.main(parser, arguments, run, findings)


if __name__ == "__main__":
    sys.exit(main())
