"""Whole runs and evaluations through the command line, on shards that are made here, and their wait for data."""

import contextlib
import importlib.util
import io
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch.nn import functional

from dist_obdsd import checkpoint
from dist_obdsd.cli import main as cli
from dist_obdsd.evaluation.evaluator import measure
from dist_obdsd.evaluation.knn import unit_rows
from dist_obdsd.evaluation.metric_parts import Settings
from tests.gpu.rig import CPU, CheckError, distance, same_bits, started, within
from tests.runs import CONFIG, make_images, metrics

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
    """All metrics of the same embeddings, searched on the CPU and, in another order, on the device: the same bits."""
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
                theirs = results.setdefault(distance_of, found.metrics)
                if differ := [name for name, value in found.metrics.items() if value != theirs[name]]:
                    raise CheckError(f"{distance_of}: {', '.join(differ)} differ on {where} and the CPU")
    return f"the same bits in {len(results['cosine'])} metrics of {n} embeddings"


def make_jpegs(folder: Path, classes: int, size: tuple[int, int]) -> None:
    """A folder per class of eight photos without edges."""
    for path in make_images(folder, classes).glob("*/*.png"):
        grey = Image.open(path).resize(size, Image.Resampling.BICUBIC)
        photo = Image.merge("RGB", (grey, ImageOps.mirror(grey), ImageOps.flip(grey)))
        photo.save(path.with_suffix(".jpg"), quality=90)
        path.unlink()


def data_wait(device: torch.device, quick: bool) -> str:
    """The share of a training run's steps in which the host asked for images. A figure, not a limit.

    Photos of 400 x 320 pixels, eight decoding processes, ResNet-50 at 224 pixels; ``none``, whose steps are the
    shortest, and ``obdsd``. Without the first epoch, in which everything warms up.
    """
    size, classes, backbone = ((40, 32), 24, "small_cnn") if quick else ((400, 320), 280, "resnet50")
    overrides = [
        f"model.backbone={backbone}", f"data.image_size={16 if quick else 224}", "data.channels=3", "data.lanes=8",
        f"data.workers={2 if quick else 8}", "data.augment=crop", f"batch.global_size={16 if quick else 112}",
        f"device={device.type}", "precision=bf16", "optim.lr=1e-5", "evaluation.test=false",
    ]  # fmt: skip
    said = []
    with shards(lambda images: make_jpegs(images, classes, size)) as folder:
        for target in ("none",) if quick else ("none", "obdsd"):
            command("train", "tiny.yaml", f"name={target}", f"distillation.target={target}", *overrides)
            epochs = [row for row in metrics(folder / "runs" / target, "epoch") if row["epoch"] > 0]
            seconds = sum(row["seconds"] for row in epochs)
            waited, images = (
                sum(row[key] * row["seconds"] for row in epochs) for key in ("data_wait_share", "images_per_s")
            )
            said.append(f"{target}: data wait {waited / seconds:.2%}, {images / seconds:.0f} images/s")
    return "; ".join(said)


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


CHECKS = {"evaluation": evaluation_is_the_same, "resumed": resumed_run_is_the_same, "data": data_wait}
