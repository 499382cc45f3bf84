"""Whole runs with the networks of real use: kernels of 1 x 1, frozen BatchNorm, colours; under DDP and DeepSpeed."""

from pathlib import Path

import pytest

from tests import runs

COLOURS = ("data.channels=3", "data.mean=[0.5,0.5,0.5]", "data.std=[0.2,0.2,0.2]", "data.image_size=32", "epochs=2",
           "data.augment=crop", "precision=float32", "max_steps=10", "data.workers=0")  # fmt: skip


@pytest.mark.parametrize(
    ("backbone", "strategy"),
    [("resnet18", ()), ("squeezenet1_0", ()), ("resnet18", ("strategy=deepspeed", "deepspeed.stage=1"))],
)
def test_a_run_learns_from_its_teacher(folder: Path, backbone: str, strategy: tuple[str, ...]) -> None:
    runs.train(folder, *COLOURS, *strategy, f"model.backbone={backbone}", ranks=2)
    rows = runs.metrics(folder / "runs" / "tiny", "step")
    assert len(rows) == 10
    assert all(row["distillation"] > 0 for row in rows[6:])  # the second epoch's
    assert runs.status(folder / "runs" / "tiny")["state"] == "finished"
