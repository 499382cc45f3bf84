"""Real runs through the command line, and small real shards to run on."""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.nursery import ROOT, Program

SECONDS = 300.0
"""That anything may take; the slowest program takes ten on a quiet machine."""

CONFIG = """
name: tiny
epochs: 3
precision: float64
device: cpu
timeout_seconds: 600
data: {shards: SHARDS, image_size: 16, channels: 1, mean: [0.5], std: [0.5], augment: affine, workers: 1, lanes: 4}
batch: {global_size: 16, samples_per_class: 2}
model: {backbone: small_cnn, embedding_dim: 16}
distillation: {target: obdsd, weight: 2, temperature: 0.1, transition_temperature: 0.05, omega: 0.5}
optim: {lr: 0.001}
evaluation: {recall_at: [1, 2], batch_size: 32}
tracking: {kind: none, every_steps: 5, figures: false}
"""


def make_images(folder: Path, classes: int = 24, per_class: int = 8) -> Path:
    """A folder per class: each class has a pattern of its own, each image its own noise."""
    rng = np.random.default_rng(0)
    for c in range(classes):
        pattern = rng.uniform(0, 255, (4, 4)).repeat(5, 0).repeat(5, 1)
        (folder / f"class_{c:02d}").mkdir(parents=True)
        for i in range(per_class):
            noisy = np.clip(pattern + rng.normal(0, 40, pattern.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / f"class_{c:02d}" / f"{i}.png")
    return folder


def program(
    *arguments: str | Path, cwd: Path, ranks: int = 0, exits: int | None = 0, env: dict[str, str] | None = None,
    code: str | None = None,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run ``dist-obdsd ...`` to its end: alone, or as several ranks that share an output.

    Args:
        exits: the exit code that it must have, or None for any.
        code: Python that runs in place of the program, with its arguments, such as ``at_step``.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        own = group_environments(ranks) if ranks else [{}]
        started = [
            Program(
                [*map(str, arguments)], cwd=cwd, env=environment((env or {}) | mine), stdout=out, stderr=err, code=code
            )
            for mine in own
        ]
        deadline = time.monotonic() + SECONDS
        try:
            codes = [one.wait(max(0.1, deadline - time.monotonic())) for one in started]
        finally:
            for one in started:
                one.kill()
        said = [os.pread(file.fileno(), 1 << 24, 0).decode() for file in (out, err)]
    done = subprocess.CompletedProcess([*map(str, arguments)], next(filter(None, codes), 0), *said)
    assert exits in (None, done.returncode), done
    return done


def at_step(what: str, step: int, rank: int = 0) -> str:
    """Python that is the program, but that does ``what`` on one rank before an optimizer step."""
    return f"""
import os, signal, time
from dist_obdsd.cli import main as cli
from dist_obdsd.training.train_step import TrainStep
once = TrainStep.__call__
def call(self, batch, progress, *rest):
    if progress.global_step == {step} and int(os.environ.get("RANK", 0)) == {rank}:
        {what}
    return once(self, batch, progress, *rest)
TrainStep.__call__ = call
cli.program()
"""


def command(*arguments: str | Path, ranks: int = 0) -> list[str]:
    launcher = [sys.executable, "-m"]
    if ranks:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    return [*launcher, "dist_obdsd", *map(str, arguments)]


def group_environments(ranks: int) -> list[dict[str, str]]:
    """Variables that tell ranks on this machine of each other, as torchrun sets them."""
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(free_port())}  # fmt: skip
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def free_port() -> int:
    """Find a free port below those that the system hands out, so that no connection takes it before."""
    for port in random.SystemRandom().sample(range(15_000, 32_000), 100):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port among a hundred")


def environment(more: dict[str, str] | None = None) -> dict[str, str]:
    # The launch files call python3 and torchrun, and the tests may be called without an activated environment.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "PATH": path}
    return os.environ | own | (more or {})


def train(folder: Path, *overrides: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Train in ``folder``, which has a ``tiny.yaml``."""
    return program("train", "tiny.yaml", *overrides, cwd=folder, **options)


def two_ranks(
    folder: Path, arguments: list[list[str]], code: list[str | None] | None = None
) -> tuple[list[int], list[str]]:
    """Exit codes and outputs of two ranks that are started differently; one whose code sleeps is killed at the end."""
    code, logs, processes = code or [None, None], [folder / "0.log", folder / "1.log"], []
    for log, env, own, its_code in zip(logs, group_environments(2), arguments, code, strict=True):
        with log.open("wb") as out:
            words = ["train", "tiny.yaml", "data.workers=0", *own]
            processes.append(Program(words, cwd=folder, env=environment(env), stdout=out, stderr=out, code=its_code))
    processes[0].wait(timeout=SECONDS)
    if "sleep" in (code[1] or ""):
        processes[1].kill()
    return [process.wait(timeout=SECONDS) for process in processes], [log.read_text() for log in logs]


def metrics(run: Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())
