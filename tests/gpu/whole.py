"""Whole runs and evaluations through the command line, on shards that are made here."""

import contextlib
import importlib.util
import io
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.nn import functional

from dist_obdsd import checkpoint
from dist_obdsd.cli import main as cli
from dist_obdsd.evaluation.evaluator import measure
from dist_obdsd.evaluation.knn import unit_rows
from dist_obdsd.evaluation.metric_parts import Settings
from tests.gpu.rig import CPU, CheckError, distance, same_bits, started, within
from tests.runs import CONFIG, make_images

METRICS = ["recall", "map@r", "r_precision", "map@c", "f1", "distances", "rho_spectrum"]
if importlib.util.find_spec("sklearn") is not None:  # which a bare machine lacks
    METRICS.append("nmi")
ROUNDING = 1e-3
"""How far a resumed run's weights may be off where no two runs give the same bits, relative to their norm."""


def resumed_run_is_the_same(device: torch.device, quick: bool) -> str:
    """Stopped by ``max_steps`` inside an epoch and started again: the weights of a run that was not stopped.

    The same bits, where the device gives one run's bits again. A GPU may not, even when torch is asked for
    deterministic kernels, since some backward passes have none; then two runs of which none was stopped say how far
    apart such runs are, and the resumed one must be as near.
    """
    with shards(lambda images: make_images(images, 12 if quick else 24)) as folder, _deterministic(device):
        overrides = [f"device={device.type}", "precision=float32", "epochs=3", "optim.name=sgd", "optim.lr=0.01",
                     "data.workers=0", "evaluation.test=false"]  # fmt: skip
        ways = {"whole": [[]], "again": [[]], "resumed": [["max_steps=5"], ["max_steps=7"], []]}
        weights = {}
        for way, attempts in ways.items():
            for more in attempts:
                command("train", "tiny.yaml", f"name={way}", *overrides, *more)
            weights[way] = checkpoint.load(folder / "runs" / way / "checkpoints" / "last")["student"]
        command("train", "tiny.yaml", "name=other", "seed=1", *overrides)
        other = checkpoint.load(folder / "runs" / "other" / "checkpoints" / "last")["student"]
    if distance(other, weights["whole"]) < 100 * ROUNDING:
        raise CheckError("another seed's run ended at the same weights, so the comparison says nothing")
    if same_bits(weights["resumed"], weights["whole"]):
        return "the same bits"
    if same_bits(weights["again"], weights["whole"]):
        raise CheckError("two whole runs end at the same bits, and the resumed one elsewhere")
    apart = distance(weights["again"], weights["whole"])
    said = within("distance of the resumed run", distance(weights["resumed"], weights["whole"]), ROUNDING)
    return f"{said}; of two whole runs {apart:.1e}: this device does not repeat its bits"


def evaluation_is_the_same(device: torch.device, quick: bool) -> str:
    """All metrics of the same embeddings, searched on the CPU and, in another order, on the device: the same bits, as
    promised. And a network's own, where rounding may decide who is nearer."""
    n = 600 if quick else 3000
    draw = torch.Generator().manual_seed(0)
    labels_n = torch.arange(n) // 6
    centres = torch.randn(n // 6, 48, generator=draw).repeat_interleave(6, 0)
    rows_nD = unit_rows(functional.normalize(centres + 2 * torch.randn(n, 48, generator=draw), dim=1))
    rows_nD[1::3] = rows_nD[::3]  # ties, which ids decide
    results = {}
    with started(device):
        for distance_of in ("cosine", "euclidean"):
            settings = Settings(METRICS, (1, 10, 100), backend="torch", distance=distance_of)
            for where, order_n in ((CPU, torch.arange(n)), (device, torch.randperm(n, generator=draw))):
                found = measure(rows_nD[order_n], order_n, labels_n[order_n], ["both"] * n, settings, device=where)
                if results.setdefault(distance_of, found.metrics) != found.metrics:
                    theirs, ours = results[distance_of], found.metrics
                    differ = [
                        f"{name} {ours[name]!r} and {theirs[name]!r}" for name in ours if ours[name] != theirs[name]
                    ]
                    raise CheckError(f"{distance_of}: {'; '.join(differ)} on {where} and the CPU")
    with shards(make_images) as folder:
        command("train", "tiny.yaml", f"device={device.type}", "precision=float32", "epochs=2", "evaluation.test=false")
        values = {}
        for where in ("cpu", device.type):
            file = folder / f"{where}.json"
            command("evaluate", "runs/tiny", "--shards", "packed", "--json", str(file), f"device={where}",
                     "evaluation.backend=torch")  # fmt: skip
            values[where] = {row["metric"]: row["value"] for row in json.loads(file.read_text())["rows"]}
    apart = max(abs(values["cpu"][name] - values[device.type][name]) for name in values["cpu"])
    said = within("a trained network's metrics apart", apart, 0.02)
    return f"the same bits in {len(results['cosine'])} metrics of {n} embeddings; {said}"


@contextmanager
def shards(make: Callable[[Path], object]) -> Iterator[Path]:
    """A working folder with a config and packed shards, of whose classes half are to train on.

    Args:
        make: fills a folder with a folder of images per class.
    """
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
        folder = Path(name)
        make(folder / "images")
        (folder / "tiny.yaml").write_text(CONFIG.replace("SHARDS", "packed"))
        os.chdir(folder)
        try:
            command("pack", "folder", "--source", "images", "--out", "packed", "--workers", "1")
            yield folder
        finally:
            os.chdir(before)


def command(*arguments: str) -> None:
    """``dist-obdsd ARGUMENTS`` in this process, quietly."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = cli.main(list(arguments))
    if code:
        raise CheckError(f"dist-obdsd {' '.join(arguments)} exited with {code}:\n{said.getvalue()}")


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Ask for kernels that repeat their bits, where torch has them; where it has none, it would warn each time."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(device.type == "cuda", warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        torch.use_deterministic_algorithms(before)
