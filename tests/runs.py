"""Real runs through the command line, and small real shards to run on."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]

CONFIG = """
name: tiny
epochs: 3
precision: float64
device: cpu
timeout_seconds: 60
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
    *arguments: str | Path, ranks: int = 0, cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``dist-obdsd ...``, alone or under torchrun, to its end."""
    return subprocess.run(
        command(*arguments, ranks=ranks), capture_output=True, text=True, timeout=300, check=False, cwd=cwd,
        env=environment(env),
    )  # fmt: skip


def command(*arguments: str | Path, ranks: int = 0) -> list[str]:
    launcher = [sys.executable, "-m"]
    if ranks:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    return [*launcher, "dist_obdsd", *map(str, arguments)]


def environment(more: dict[str, str] | None = None) -> dict[str, str]:
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    return os.environ | own | (more or {})


def train(folder: Path, *overrides: str, ranks: int = 0, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Train in ``folder``, which has a ``tiny.yaml``, and check the exit code."""
    done = program("train", "tiny.yaml", *overrides, ranks=ranks, cwd=folder)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def metrics(run: Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())
