"""Runs that are stopped in good order, or started again."""

import os
import signal

import pytest

from dist_obdsd import checkpoint
from dist_obdsd.training.model_selection import ModelSelector
from tests import chaos, runs
from tests.chaos import difference, result


@pytest.mark.parametrize(("settings", "step", "inside"), [
    (["epochs=2"], 7, True), (["max_steps=4", "validation.fraction=0.25"], 2, False),
])  # fmt: skip
def test_a_signal_to_one_rank_stops_all_and_the_run_goes_on(folder, run, untouched, settings, step, inside):
    """The others learn of it from the step's all-reduce. At an epoch's last step the epoch ends first."""
    signalled = runs.at_step("os.kill(os.getpid(), signal.SIGUSR1)", step, rank=1)
    runs.train(folder, *settings, ranks=2, code=signalled, exits=75)
    assert runs.status(run)["state"] == "preempted"
    assert (checkpoint.load(run)["position"]["step"] > 0) == inside
    runs.train(folder, *settings, ranks=2)
    assert difference(result(untouched(*settings, ranks=2)), result(run)) is None


CTRL_C, STOP_FILE = "os.kill(os.getpid(), signal.SIGINT)", "cli.main(['stop', 'runs/tiny'])"


@pytest.mark.parametrize(
    ("ask", "reason", "restarts", "exits"),
    [(CTRL_C, "SIGINT", 3, 75), (STOP_FILE, "runs/tiny/stop", 0, 75), (STOP_FILE, "runs/tiny/stop", 3, 0)],
)
def test_a_request_to_stop_saves_and_is_not_restarted(train, cli, folder, run, ask, reason, restarts, exits):
    """torchrun starts again what ends with an error, as a run does that goes on elsewhere, but not a stopped one."""
    at_once = "from dist_obdsd.training import preemption; preemption.POLL_SECONDS = 0"
    environment = {"TORCHELASTIC_MAX_RESTARTS": str(restarts)}
    runs.train(folder, "epochs=2", code=runs.at_step(f"{at_once}; {ask}", 4), env=environment, exits=exits)
    status = runs.status(run)
    assert status["state"] == "preempted"
    assert reason in status["message"]
    assert not (run / "stop").exists()
    assert 4 < checkpoint.load(run)["position"]["global_step"] < 8
    for given, since, state in (("tiny.yaml", "1", "preempted"), ("runs/tiny", "9e9", "none")):
        assert cli("status", given, "--since", since, cwd=folder).stdout == f"{state}\n"
    assert "resuming" in train("epochs=2").stdout


@pytest.mark.parametrize(("stopped_in", "validated"), [("validation", [1]), ("test", [1, 2])])
def test_a_stopped_validation_is_done_later(train, run, untouched, monkeypatch, stopped_in, validated):
    more = ("validation.fraction=0.25", "evaluation.batch_size=2", "evaluation.best_test=true", "data.workers=0")
    once = ModelSelector._evaluate

    def evaluate(self, what, split, classes, epoch):
        if (what, epoch) == (stopped_in, 2):
            os.kill(os.getpid(), signal.SIGTERM)
        return once(self, what, split, classes, epoch)

    with monkeypatch.context() as patched:
        patched.setattr(ModelSelector, "_evaluate", evaluate)
        train(*more, exits=75)
    assert runs.status(run)["state"] == "preempted"
    stopped = checkpoint.load(run)
    assert stopped["pending_validation"]
    assert stopped["position"]["epoch"] == 2
    assert [row["epoch"] for row in runs.metrics(run, "validation")] == validated
    train(*more)
    assert difference(result(untouched(*more)), result(run)) is None


def test_checkpoints_inside_an_epoch_by_steps_and_by_time(train, folder):
    more = ("epochs=2", "checkpoint.keep=50")
    out = train("name=steps", *more, "checkpoint.every_steps=4").stdout
    names = sorted(path.name for path in (folder / "runs" / "steps" / "checkpoints").glob("*.pt"))
    assert names == ["epoch-0001.pt", "epoch-0002.pt", "step-00000004.pt", "step-00000008.pt"]
    assert "saved step-00000004.pt: " in out
    train("name=minutes", *more, "checkpoint.every_minutes=0.000001")
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
def test_the_objective_is_resumed_inside_an_epoch(train, run, settings):
    settings = ("epochs=2", *settings)
    train("name=whole", *settings)
    train(*settings, "max_steps=9")
    stopped = checkpoint.load(run)
    assert stopped["position"]["step"] > 0
    assert stopped["objective"]
    assert stopped["objective_optimizer"].keys() <= stopped["objective"].keys()
    assert (stopped["manifold_memory"] is not None) == ("distillation.memory=24" in settings)
    train(*settings)
    whole, resumed = checkpoint.load(run.with_name("whole")), checkpoint.load(run)
    for part in ("student", "teacher", "optimizer", "objective", "objective_optimizer"):
        assert difference(whole[part], resumed[part]) is None, part
    assert difference(stopped["objective"], resumed["objective"]) is not None


def test_a_checkpoint_of_the_version_before_goes_on(train, run, untouched):
    """It may lack entries, and says "unjudged" of an epoch that is still to be validated."""
    settings = ("validation.fraction=0.25", "epochs=2")
    train(*settings)
    state = checkpoint.load(run / "checkpoints" / "epoch-0001.pt")
    # As it was when that validation began.
    state |= {"unjudged": True, "best_validation": None}
    del state["pending_validation"], state["best_test"], state["last_test"], state["format"]
    checkpoint.save(run / "checkpoints", state, best=False, keep=0)
    train(*settings)
    whole, resumed = (result(run) | {"metrics": None} for run in (untouched(*settings), run))
    assert difference(whole, resumed) is None


def test_a_finished_run_says_so_and_fresh_makes_a_new_one(train, run):
    train("epochs=2", "validation.every=2")
    assert {row["protocol"] for row in chaos.result(run)["summary"]} == {"last"}
    assert len(runs.metrics(run, "test")) == 1  # without being asked, the test set is measured once
    assert runs.metrics(run, "validation") == []
    before = (run / "metrics.jsonl").read_bytes()
    assert "is finished already" in train("epochs=2", "validation.every=2").stdout
    assert (run / "metrics.jsonl").read_bytes() == before
    (run / "summary.json").unlink()  # a run that lost it measures the test set again
    train("epochs=2", "validation.every=2")
    assert {row["protocol"] for row in chaos.result(run)["summary"]} == {"last"}
    assert "runs/tiny-2" in train("--fresh", "max_steps=1").stdout


@pytest.mark.parametrize("variable", ["TORCHELASTIC_MAX_RESTARTS", "SLURM_RESTART_COUNT"])
def test_fresh_is_refused_where_a_restart_would_begin_anew(train, run, monkeypatch, variable):
    monkeypatch.setenv(variable, "2")
    assert f"{variable}=2" in train("--fresh", "max_steps=1", exits=2).stderr
    assert not run.parent.exists()
