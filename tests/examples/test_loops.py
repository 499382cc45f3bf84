"""The examples' loops give the losses and the weights of ``dist-obdsd train`` on the same batches, on 1 and 2 ranks."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dist_obdsd import checkpoint
from tests import runs

OVERRIDES = (
    "precision=float32",
    "epochs=4",
    "distillation.weight=10",
    "optim.weight_decay=0",
    "optim.lr=1e-4",
    "evaluation.test=false",
)


@pytest.mark.parametrize(
    ("example", "ranks", "alike"),
    [
        ("ddp", 1, 1), ("ddp", 2, 2), ("ddp", 3, 2),  # of which two are a subgroup
        ("accelerate_loop", 1, 1), ("accelerate_loop", 2, 2), ("lightning_module", 2, 2),
    ],
)  # fmt: skip
def test_a_loop_of_one_s_own_trains_the_same(
    example: str, ranks: int, alike: int, untouched: Callable[..., Path], tmp_path: Path
) -> None:
    """As a run on ``alike`` ranks does."""
    reference, out = untouched(*OVERRIDES, ranks=alike), tmp_path / "out.pt"
    done = runs.program(
        example, reference / "config.yaml", out, ranks=ranks, cwd=tmp_path,
        code="import runpy; runpy.run_module('tests.examples.compare', run_name='__main__')",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = torch.load(out)
    steps = runs.metrics(reference, "step")
    expected = [
        row["ranking"] + (row["ramp"] * 10 * 0.1**2 * row["distillation"] if "distillation" in row else 0)
        for row in steps
    ]
    assert len(expected) > 20
    assert found["losses"] == pytest.approx(expected, rel=1e-6, abs=1e-6)
    student = checkpoint.load(reference)["student"]
    for name, tensor in found["student"].items():
        assert (tensor - student[name]).abs().max() < 1e-5, name


@pytest.mark.parametrize("loss", ["SupConLoss", "MeanDistance"])
def test_a_run_takes_a_loss_by_its_import_path(loss: str, folder: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(runs.ROOT / 'examples')!r})\n"
    code += "from dist_obdsd.cli.main import program; program()"
    settings = ("train", "tiny.yaml", "epochs=2", "evaluation.test=false", f"ranking.name=custom_loss:{loss}")
    for name, ranks in (("one", 0), ("two", 2)):
        done = runs.program(*settings, f"name={name}", ranks=ranks, cwd=folder, code=code)
        assert done.returncode == 0, done.stderr
    one, two = (runs.metrics(folder / "runs" / run, "step") for run in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a["ranking"] == pytest.approx(b["ranking"], rel=1e-10)
    assert one[-1]["ranking"] != one[0]["ranking"]
    assert f"custom_loss:{loss}" in (folder / "runs" / "one" / "config.yaml").read_text()
    done = runs.program(*settings, "name=three", cwd=folder)  # where nobody finds the module
    assert done.returncode == 2
    assert "custom_loss" in done.stderr
    assert "PYTHONPATH" in done.stderr


@pytest.mark.parametrize(
    ("setting", "code", "fact"),
    [
        ("ranking.name", "class Mine:\n    def __init__(self):\n        1 / 0\n", "ZeroDivisionError.*mine.py, line 3"),
        ("ranking.name", "class Mine:\n    def __init__(self, a):\n        pass\n", "missing a required argument: 'a'"),
        ("distillation.target", "import torch\ntorch.nn.Linear('a', 1)\n", "TypeError.*mine.py, line 2"),
        ("distillation.target", "def f(:\n", "SyntaxError.*mine.py, line 1"),
        ("distillation.target", "", "mine.py defines no Mine"),
        ("model.backbone", "def Mine():\n    return {}['x']\n", "KeyError: 'x'.*mine.py, line 2"),
    ],
)
def test_a_part_of_one_s_own_that_fails_is_one_sentence(setting: str, code: str, fact: str, folder: Path) -> None:
    (folder / "mine.py").write_text(code)
    path = {"PYTHONPATH": f"{runs.ROOT}:{folder}"}
    start = f"import sys; sys.path.insert(0, {str(folder)!r}); from dist_obdsd.cli.main import program; program()"
    done = runs.program("train", "tiny.yaml", f"{setting}=mine:Mine", ranks=2, cwd=folder, code=start, env=path)
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(f"dist-obdsd: {setting}=mine:Mine.*{fact}.*\n", done.stderr), done.stderr
