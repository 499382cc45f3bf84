"""Bad input is told in one line, by one rank, with exit code 2, and nothing hangs."""

import fcntl
import json
import shutil

import pytest

from dist_obdsd.manifold import targets as manifold
from tests import runs


def one_line(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.startswith("dist-obdsd: ")]
    assert len(lines) == 1, stderr
    return lines[0]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optim.learning_rate=1", "did you mean"),
        ("data.shards=nowhere", "there is no shard folder nowhere"),
        ("validation.fraction=0.01", "both sides need at least two classes"),
        ("model.pretrained=weights.pth", "weights.pth is no file"),
        ("output=/proc/nowhere", "cannot write the run folder"),
    ],
)
def test_a_wrong_setting(train, folder, override, sentence):
    code, _, err = train(override)
    assert code == 2
    assert sentence in one_line(err)
    assert "Traceback" not in err
    assert not (folder / "runs" / "tiny" / "checkpoints").exists()


def test_what_all_ranks_meet_is_told_once(folder):
    line = one_line(runs.train(folder, ranks=3, code=2).stderr)
    assert "3 ranks do not divide data.lanes=4" in line
    assert "1, 2, 4" in line


def test_a_run_folder_in_use(folder):
    (folder / "runs" / "tiny").mkdir(parents=True)
    with (folder / "runs" / "tiny" / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "in use by a live run" in one_line(runs.train(folder, code=2).stderr)


def test_a_cut_test_shard_is_met_before_training(folder, shards):
    cut = folder / "cut"
    shutil.copytree(shards, cut)
    victim = cut / json.loads((cut / "manifest.json").read_text())["splits"]["test"][-1]["file"]
    victim.write_bytes(victim.read_bytes()[:-512])
    for command in ("train", "doctor"):
        done = runs.program(command, "tiny.yaml", f"data.shards={cut}", cwd=folder)
        assert done.returncode == 2
        assert f"{victim.name} (it has {victim.stat().st_size} bytes" in done.stderr
    assert not (folder / "runs" / "tiny" / "status.json").exists()


def test_a_broken_shard_ends_every_rank_with_its_name(folder, shards):
    broken = folder / "broken"
    shutil.copytree(shards, broken)
    victim = json.loads((broken / "manifest.json").read_text())["splits"]["train"][0]["file"]
    data = (broken / victim).read_bytes()
    (broken / victim).write_bytes(data[: len(data) // 2].ljust(len(data), b"\0"))
    done = runs.program("train", "tiny.yaml", f"data.shards={broken}", ranks=2, cwd=folder)
    assert done.returncode != 0
    assert victim in done.stderr
    assert "verify" in done.stderr
    status = runs.status(folder / "runs" / "tiny")
    assert status["state"] == "failed"
    assert victim in status["message"]


LOSS = """import torch
class Loss(torch.nn.Module):
    steps = 0
    def forward(self, rows, labels):
        self.steps += 1
        if self.steps == 3:
            raise KeyError("temperature")
        return rows.square().mean()
"""


def test_an_error_of_your_own_loss_in_a_step_is_told_with_its_line(train, folder, monkeypatch):
    (folder / "own_loss.py").write_text(LOSS)
    monkeypatch.syspath_prepend(folder)
    code, out, err = train("ranking.name=own_loss:Loss", "--verbose")
    assert code == 2
    fact = f"ranking.name=own_loss:Loss fails with KeyError: 'temperature' ({folder}/own_loss.py, line 7)"
    assert fact in one_line(err)
    assert "at step 2" in err
    assert "Traceback" in out  # for --verbose alone
    assert "Traceback" not in err + train("ranking.name=own_loss:Loss", "name=again")[1]


def test_a_loss_that_stays_not_finite_stops_the_run(train, folder):
    code, _, err = train("optim.lr=1e300", "max_nonfinite_steps=2")
    assert code == 1
    assert "2 steps in a row" in err
    assert runs.status(folder / "runs" / "tiny")["state"] == "failed"


def test_a_step_that_went_wrong_is_counted_and_ends_a_debug_run(train, folder, monkeypatch):
    real = manifold.target_rows

    def off(*arguments):
        found = real(*arguments)
        return manifold.DiffusionTarget(found.target_bB * 1.001, found.error_b)

    monkeypatch.setattr(manifold, "target_rows", off)
    code, out, _ = train("epochs=2")
    assert code == 0
    first = runs.metrics(folder / "runs" / "tiny", "step")
    defective = [row for row in first if row.get("target_defects")]
    assert len(defective) == len([row for row in first if row["epoch"] == 1])
    assert f"100.0% of the target's rows are not distributions (step {len(defective)} so)" in out
    for more, fact in (
        (["name=debug"], "rows are not distributions (step 1 so); debug=true stops here"),
        (["name=nan", "optim.lr=1e300", "optim.name=sgd"], "so the step was left out; debug=true stops here"),
    ):
        code, _, err = train("epochs=2", "debug=true", *more)
        assert code == 1
        assert fact in err
    assert runs.status(folder / "runs" / "debug")["state"] == "failed"
