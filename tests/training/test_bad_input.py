"""Bad input is told in one line, by one rank, with exit code 2, and nothing hangs."""

import fcntl
import json
import shutil

import pytest
import torch

from dist_obdsd.manifold import targets as manifold
from tests import runs


def one_line(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.startswith("dist-obdsd: ")]
    assert len(lines) == 1, stderr
    return lines[0]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("validation.fraction=0.01", "both sides need at least two classes"),
        ("model.pretrained=weights.pth", "weights.pth is no file"),
        ("output=/proc/nowhere", "cannot write the run folder"),
    ],
)
def test_a_wrong_setting(train, run, override, sentence):
    err = train(override, exits=2).stderr
    assert sentence in one_line(err)
    assert "Traceback" not in err
    assert not (run / "checkpoints").exists()


def test_a_run_folder_in_use(folder, run):
    run.mkdir(parents=True)
    with (run / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "in use by a live run" in one_line(runs.train(folder, exits=2).stderr)


def test_a_cut_test_shard_is_met_before_training(folder, run, shards):
    cut = folder / "cut"
    shutil.copytree(shards, cut)
    victim = cut / json.loads((cut / "manifest.json").read_text())["splits"]["test"][-1]["file"]
    victim.write_bytes(victim.read_bytes()[:-512])
    for command in ("train", "doctor"):
        done = runs.program(command, "tiny.yaml", f"data.shards={cut}", cwd=folder, exits=2)
        assert f"{victim.name} (it has {victim.stat().st_size} bytes" in done.stderr
    assert not (run / "status.json").exists()


def test_a_broken_shard_ends_every_rank_with_its_name(folder, run, shards):
    broken = folder / "broken"
    shutil.copytree(shards, broken)
    victim = json.loads((broken / "manifest.json").read_text())["splits"]["train"][0]["file"]
    data = (broken / victim).read_bytes()
    (broken / victim).write_bytes(data[: len(data) // 2].ljust(len(data), b"\0"))
    done = runs.train(folder, f"data.shards={broken}", ranks=2, exits=1)
    assert victim in done.stderr
    assert "verify" in done.stderr
    status = runs.status(run)
    assert status["state"] == "failed"
    assert victim in status["message"]


LOSS = """import torch
class Loss(torch.nn.Module):
    def forward(self, rows, labels):
        raise KeyError("temperature")
"""


def test_an_error_of_your_own_loss_names_its_line(train, folder, monkeypatch):
    (folder / "own_loss.py").write_text(LOSS)
    monkeypatch.syspath_prepend(folder)
    done = train("ranking.name=own_loss:Loss", "--verbose", exits=2)
    fact = f"ranking.name=own_loss:Loss fails with KeyError: 'temperature' ({folder}/own_loss.py, line 4)"
    assert fact in one_line(done.stderr)
    assert "at step 0" in done.stderr
    assert "Traceback" in done.stdout  # for --verbose alone
    assert "Traceback" not in done.stderr + train("ranking.name=own_loss:Loss", "name=again", exits=2).stdout


@pytest.mark.parametrize(
    ("limit", "fact"),
    [("max_nonfinite_steps=2", "2 steps in a row"), ("debug=true", "the step was left out; debug=true stops here")],
)
def test_a_loss_that_stays_not_finite_stops_the_run(train, run, limit, fact):
    assert fact in train("epochs=2", "optim.name=sgd", "optim.lr=1e300", limit, exits=1).stderr
    assert runs.status(run)["state"] == "failed"


def test_a_step_that_went_wrong_is_counted_and_ends_a_debug_run(train, run, monkeypatch):
    real = manifold.target_rows

    def off(*arguments):
        found = real(*arguments)
        return manifold.DiffusionTarget(found.target_bB * 1.001, found.error_b)

    monkeypatch.setattr(manifold, "target_rows", off)
    out = train("epochs=2").stdout
    rows = runs.metrics(run, "step")
    defective = [row for row in rows if row.get("target_defects")]
    assert defective == [row for row in rows if row["epoch"] == 1]
    assert f"100.0% of the target's rows are not distributions (step {len(defective)} so)" in out
    err = train("epochs=2", "debug=true", "name=debug", exits=1).stderr
    assert "rows are not distributions (step 1 so); debug=true stops here" in err


@pytest.fixture
def stopped(folder, untouched):
    """A run that stopped after two steps."""
    run = untouched("max_steps=2")
    return shutil.copytree(run, folder / "runs" / run.name)


@pytest.mark.parametrize(
    ("spoil", "fact"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "step-00000002.pt is not a readable checkpoint"),
        (lambda path: torch.save({"state_dict": {}}, path), "step-00000002.pt has format None"),
        (lambda path: torch.save(torch.load(path) | {"student": {}}, path), '"head.weight"'),
    ],
    ids=["cut short", "of another program", "of another network"],
)
def test_a_checkpoint_that_is_not_the_run_s_is_refused(train, stopped, spoil, fact):
    spoil(stopped / "checkpoints" / "step-00000002.pt")
    (line,) = train(f"name={stopped.name}", exits=2).stderr.splitlines()
    assert fact in line


def test_other_settings_are_refused_by_name_and_value(train, stopped):
    err = train(f"name={stopped.name}", "optim.lr=0.5", "epochs=4", exits=2).stderr
    assert "(epochs: 3 -> 4; optim.lr: 0.001 -> 0.5)" in err
    train(f"name={stopped.name}", "data.workers=1", "threads=2", "max_steps=2")  # what may change


WITHOUT_A_GPU = """
import torch
from dist_obdsd.cli import main as cli
from dist_obdsd.distributed import launch
launch.choose_device = lambda *_: torch.device("meta")  # stands for any other device
cli.program()
"""


@pytest.mark.parametrize(
    ("of_rank_1", "code", "sentence"),
    [
        ("optim.lr=0.5", None, "(optim.lr is 0.001 on rank 0, 0.5 on rank 1)"),
        ("optim.rate=0.5", None, "reading the config failed on rank 1: tiny.yaml: unknown setting optim.rate"),
        ("seed=0", WITHOUT_A_GPU, '(device is "cpu" on rank 0, "meta" on rank 1)'),
    ],
)
def test_a_rank_that_was_started_differently_ends_all_at_once(folder, of_rank_1, code, sentence):
    arguments = [["timeout_seconds=3600"], ["timeout_seconds=3600", of_rank_1]]
    codes, said = runs.two_ranks(folder, arguments, [None, code])
    assert codes == [2, 2], said  # nobody waits for the other
    assert sentence in said[0]
    assert said[1] == ""  # by one of them
    assert not (folder / "runs").exists()
