"""Runs that are stopped in good order, or started again."""

import os
import signal

import pytest

from dist_obdsd import checkpoint
from dist_obdsd.cli.main import main
from dist_obdsd.training import preemption
from dist_obdsd.training.model_selection import ModelSelector
from tests import chaos, runs
from tests.chaos import difference, result


def test_a_signal_to_one_rank_stops_all_and_the_run_goes_on(folder, untouched):
    """The others learn of it from the step's all-reduce."""
    signalled = runs.at_step("os.kill(os.getpid(), signal.SIGUSR1)", 7, rank=1)
    done = runs.program("train", "tiny.yaml", "epochs=2", ranks=2, cwd=folder, code=signalled)
    run = folder / "runs" / "tiny"
    assert done.returncode == 75, done.stderr
    assert runs.status(run)["state"] == "preempted"
    assert checkpoint.load(run)["position"]["step"] > 0
    runs.train(folder, "epochs=2", ranks=2)
    assert difference(result(untouched("epochs=2", ranks=2)), result(run)) is None


@pytest.mark.parametrize(
    ("how", "restarts", "expected"), [("Ctrl-C", 3, 75), ("a stop file", 0, 75), ("a stop file", 3, 0)]
)
def test_a_request_to_stop_saves_and_is_not_restarted(
    train, before_step, folder, monkeypatch, capfd, how, restarts, expected
):
    """torchrun starts again what ends with an error, as a run does that goes on elsewhere, but not a stopped one."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", str(restarts))

    def ask():
        if how == "Ctrl-C":
            os.kill(os.getpid(), signal.SIGINT)
        else:
            assert runs.program("stop", "runs/tiny", cwd=folder).returncode == 0

    monkeypatch.setattr(preemption, "POLL_SECONDS", 0.0)
    before_step(4, ask)
    run = folder / "runs" / "tiny"
    assert train("epochs=2")[0] == expected
    status = runs.status(run)
    assert status["state"] == "preempted"
    assert ("SIGINT" if how == "Ctrl-C" else "runs/tiny/stop") in status["message"]
    assert not (run / "stop").exists()
    assert 4 < checkpoint.load(run)["position"]["global_step"] < 8
    for given, since, state in (("tiny.yaml", "1", "preempted"), ("runs/tiny", "9e9", "none")):
        assert main(["status", given, "--since", since]) == 0
        assert capfd.readouterr().out == f"{state}\n"
    code, out, _ = train("epochs=2")
    assert code == 0
    assert "resuming" in out


@pytest.mark.parametrize(("stopped_in", "validated"), [("validation", [1]), ("test", [1, 2])])
def test_an_epoch_whose_validation_is_stopped_is_validated_later(
    train, folder, untouched, monkeypatch, stopped_in, validated
):
    more = (
        "validation.fraction=0.25", "evaluation.batch_size=2", "evaluation.best_test=true", "epochs=3",
        "data.workers=0",
    )  # fmt: skip
    run, once = folder / "runs" / "tiny", ModelSelector._evaluate

    def evaluate(self, what, split, classes, epoch):
        if (what, epoch) == (stopped_in, 2):
            os.kill(os.getpid(), signal.SIGTERM)
        return once(self, what, split, classes, epoch)

    with monkeypatch.context() as patched:
        patched.setattr(ModelSelector, "_evaluate", evaluate)
        assert train(*more)[0] == os.EX_TEMPFAIL
    assert runs.status(run)["state"] == "preempted"
    stopped = checkpoint.load(run)
    assert stopped["pending_validation"]
    assert stopped["position"]["epoch"] == 2
    assert [row["epoch"] for row in runs.metrics(run, "validation")] == validated
    assert train(*more)[0] == 0
    assert difference(result(untouched(*more)), result(run)) is None


def test_checkpoints_inside_an_epoch_by_steps_and_by_time(train, folder):
    more = ("epochs=2", "checkpoint.keep=50")
    code, out, _ = train("name=steps", *more, "checkpoint.every_steps=4")
    assert code == 0
    names = sorted(path.name for path in (folder / "runs" / "steps" / "checkpoints").glob("*.pt"))
    assert names == ["epoch-0001.pt", "epoch-0002.pt", "step-00000004.pt", "step-00000008.pt"]
    assert "saved step-00000004.pt: " in out
    assert "training waited" in out
    assert train("name=minutes", *more, "checkpoint.every_minutes=0.000001")[0] == 0
    steps = len(runs.metrics(folder / "runs" / "minutes", "step"))
    names = [path.name for path in (folder / "runs" / "minutes" / "checkpoints").glob("step-*.pt")]
    assert steps / 4 < len(names) < steps  # asked for in one step, read in the next, written after it
    a, b = (result(folder / "runs" / name) for name in ("steps", "minutes"))
    assert difference(a, b) is None


@pytest.mark.parametrize(
    "settings",
    [
        ["ranking.name=margin", "ranking.lr=0.01", "distillation.memory=24", "distillation.solver=cg"],
        ["ranking.name=proxy_anchor", "ranking.lr=0.01", "batch.chunk=3"],
        ["ranking.name=pml.SoftTripleLoss", "ranking.miner=pml.UniformHistogramMiner", "optim.name=sgd"],
    ],
    ids=["margin, memory", "proxies, chunks", "pytorch-metric-learning"],
)
def test_the_objective_is_resumed_inside_an_epoch(train, folder, settings):
    settings = ("epochs=2", *settings)
    assert train("name=whole", *settings)[0] == train(*settings, "max_steps=9")[0] == 0
    stopped = checkpoint.load(folder / "runs" / "tiny")
    assert stopped["position"]["step"] > 0
    assert stopped["objective"]
    assert stopped["objective_optimizer"].keys() <= stopped["objective"].keys()
    assert (stopped["manifold_memory"] is not None) == ("distillation.memory=24" in settings)
    assert train(*settings)[0] == 0
    whole, resumed = (checkpoint.load(folder / "runs" / name) for name in ("whole", "tiny"))
    for part in ("student", "teacher", "optimizer", "objective", "objective_optimizer"):
        assert difference(whole[part], resumed[part]) is None, part
    assert difference(stopped["objective"], resumed["objective"]) is not None


def test_a_checkpoint_of_the_version_before_goes_on(train, folder, untouched):
    """It may lack entries, and says "unjudged" of an epoch that is still to be validated."""
    settings, run = ("validation.fraction=0.25", "epochs=2"), folder / "runs" / "tiny"
    assert train(*settings)[0] == 0
    state = checkpoint.load(run / "checkpoints" / "epoch-0001.pt")
    # As it was when that validation began.
    state |= {"unjudged": True, "best_validation": None}
    del state["pending_validation"], state["best_test"], state["last_test"], state["format"]
    checkpoint.save(run / "checkpoints", state, best=False, keep=0)
    assert train(*settings)[0] == 0
    whole, resumed = (result(run) | {"metrics": None} for run in (untouched(*settings), run))
    assert difference(whole, resumed) is None


def test_a_finished_run_says_so_and_fresh_makes_a_new_one(train, folder):
    assert train("epochs=2", "validation.every=2")[0] == 0
    run = folder / "runs" / "tiny"
    assert {row["protocol"] for row in chaos.result(run)["summary"]} == {"last"}
    assert len(runs.metrics(run, "test")) == 1  # without being asked, the test set is measured once
    assert runs.metrics(run, "validation") == []
    before = (run / "metrics.jsonl").read_bytes()
    assert "is finished already" in train("epochs=2", "validation.every=2")[1]
    assert (run / "metrics.jsonl").read_bytes() == before
    code, out, _ = train("--fresh", "max_steps=1")
    assert code == 0
    assert "runs/tiny-2" in out


@pytest.mark.parametrize("variable", ["TORCHELASTIC_MAX_RESTARTS", "SLURM_RESTART_COUNT"])
def test_fresh_is_refused_where_a_restart_would_begin_anew(train, folder, monkeypatch, variable):
    monkeypatch.setenv(variable, "2")
    code, _, err = train("--fresh", "max_steps=1")
    assert code == 2
    assert f"{variable}=2" in err
    assert not (folder / "runs").exists()
