"""The examples' loops give the losses and the weights of ``dist-obdsd train`` on the same batches, on 1 and 2 ranks."""

import importlib
import os
import re
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from dist_obdsd import BalancedStream, checkpoint
from dist_obdsd.config import load_config
from dist_obdsd.models.embedder import build_embedder
from tests import runs

OVERRIDES = ("precision=float32", "epochs=4", "distillation.weight=10", "optim.weight_decay=0", "optim.lr=1e-4")
EXAMPLES = f"import sys; sys.path.insert(0, {str(runs.ROOT / 'examples')!r}); "


def train_as(name, path, out):
    """Be one rank that trains as an example does."""
    torch.set_num_threads(1)
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    more = {}
    if ranks > 1 and name == "ddp":  # the frameworks open a process group by themselves
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    if ranks == 3:  # the first two share a batch, the third takes no part
        more, ranks = {"group": dist.new_group([0, 1])}, 2
        if rank == 2:
            return
    config = load_config(path)
    student = build_embedder(config, torch.device("cpu"))
    data = {key: getattr(config.data, key) for key in ("image_size", "channels", "lanes")}
    stream = BalancedStream(
        config.data.shards, global_batch_size=config.batch.global_size, seed=config.seed, rank=rank, world_size=ranks,
        transform=config.data.augment, num_workers=1, **data,
    )  # fmt: skip
    train = importlib.import_module(name).train
    losses = train(student, stream, config.epochs, config.optim.lr, config.distillation.weight, **more)
    stream.close()
    if rank == 0:
        torch.save({"losses": losses, "student": student.state_dict()}, out)


@pytest.mark.parametrize(
    ("example", "ranks", "alike"),
    [
        ("ddp", 1, 1), ("ddp", 2, 2), ("ddp", 3, 2),  # of which two are a subgroup
        ("accelerate_loop", 1, 1), ("accelerate_loop", 2, 2), ("lightning_module", 2, 2),
    ],
)  # fmt: skip
def test_a_loop_of_one_s_own_trains_the_same(example, ranks, alike, untouched, tmp_path):
    """As a run on ``alike`` ranks does."""
    reference, out = untouched(*OVERRIDES, ranks=alike), tmp_path / "out.pt"
    code = EXAMPLES + "from tests.examples.test_loops import train_as; train_as(*sys.argv[1:])"
    runs.program(example, reference / "config.yaml", out, ranks=ranks, cwd=tmp_path, code=code)
    found = torch.load(out)
    expected = [
        row["ranking"] + (row["ramp"] * 10 * 0.1**2 * row["distillation"] if "distillation" in row else 0)
        for row in runs.metrics(reference, "step")
    ]
    assert len(expected) > 20
    assert found["losses"] == pytest.approx(expected, rel=1e-6, abs=1e-6)
    student = checkpoint.load(reference)["student"]
    for name, tensor in found["student"].items():
        assert (tensor - student[name]).abs().max() < 1e-5, name


@pytest.mark.parametrize("loss", ["SupConLoss", "MeanDistance"])
def test_a_run_takes_a_loss_by_its_import_path(loss, folder):
    code = EXAMPLES + "from dist_obdsd.cli.main import program; program()"
    settings = ("epochs=2", "evaluation.test=false", f"ranking.name=custom_loss:{loss}")
    for name, ranks in (("one", 0), ("two", 2)):
        runs.train(folder, *settings, f"name={name}", ranks=ranks, code=code)
    one, two = (runs.metrics(folder / "runs" / run, "step") for run in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a["ranking"] == pytest.approx(b["ranking"], rel=1e-10)
    assert one[-1]["ranking"] != one[0]["ranking"]
    assert f"custom_loss:{loss}" in (folder / "runs" / "one" / "config.yaml").read_text()
    done = runs.train(folder, *settings, "name=three", exits=2)  # where nobody finds the module
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
def test_a_part_of_one_s_own_that_fails_is_one_sentence(setting, code, fact, folder):
    (folder / "mine.py").write_text(code)
    path = {"PYTHONPATH": f"{runs.ROOT}:{folder}"}
    start = f"import sys; sys.path.insert(0, {str(folder)!r}); from dist_obdsd.cli.main import program; program()"
    done = runs.train(folder, f"{setting}=mine:Mine", ranks=2, code=start, env=path, exits=2)
    assert re.fullmatch(f"dist-obdsd: {setting}=mine:Mine.*{fact}.*\n", done.stderr), done.stderr
