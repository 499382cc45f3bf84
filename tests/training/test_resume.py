"""Runs that are killed, stopped or started again."""

import signal

import pytest

from dist_obdsd import checkpoint
from tests import runs
from tests.chaos import difference, result


def test_killed_and_restarted_ends_with_the_same_bits(folder):
    """In processes with hash seeds of their own. On several ranks, and with DeepSpeed: test_survival."""
    runs.train(folder, "name=whole", "epochs=4")
    killed = runs.at_step("os.killpg(0, signal.SIGKILL)", 14)
    done = runs.program("train", "tiny.yaml", "epochs=4", cwd=folder, anew=True, code=killed)
    assert done.returncode == -signal.SIGKILL
    assert (folder / "runs" / "tiny" / "checkpoints" / "last").exists()
    assert runs.status(folder / "runs" / "tiny")["state"] == "running"
    assert "resuming" in runs.train(folder, "epochs=4", anew=True).stdout
    assert difference(result(folder / "runs" / "whole"), result(folder / "runs" / "tiny")) is None


def test_a_signal_stops_between_steps_and_the_run_goes_on(folder):
    runs.train(folder, "name=whole", ranks=2)
    # To one rank only: the others learn of it from the step's all-reduce.
    signalled = runs.at_step("os.kill(os.getpid(), signal.SIGUSR1)", 7, rank=1)
    done = runs.program("train", "tiny.yaml", ranks=2, cwd=folder, code=signalled)
    assert done.returncode == 75, done.stderr
    assert runs.status(folder / "runs" / "tiny")["state"] == "preempted"
    assert checkpoint.load(folder / "runs" / "tiny")["position"]["step"] > 0
    runs.train(folder, ranks=2)
    assert difference(result(folder / "runs" / "whole"), result(folder / "runs" / "tiny")) is None


@pytest.mark.parametrize(
    "settings",
    [
        ["ranking.name=margin", "ranking.lr=0.01", "distillation.memory=24", "distillation.solver=cg"],
        ["ranking.name=proxy_anchor", "ranking.lr=0.01", "batch.chunk=3"],
        ["ranking.name=pml.SoftTripleLoss", "ranking.miner=pml.UniformHistogramMiner", "optim.name=sgd"],
    ],
    ids=["margin, memory", "proxies, chunks", "pytorch-metric-learning"],
)
def test_the_objective_is_resumed_inside_an_epoch(folder, settings):
    runs.train(folder, "name=whole", *settings)
    runs.train(folder, *settings, "max_steps=9")
    stopped = checkpoint.load(folder / "runs" / "tiny")
    assert stopped["position"]["step"] > 0
    assert stopped["objective"]
    assert stopped["objective_optimizer"].keys() <= stopped["objective"].keys()
    assert (stopped["manifold_memory"] is not None) == ("distillation.memory=24" in settings)
    runs.train(folder, *settings)
    whole, resumed = (checkpoint.load(folder / "runs" / name) for name in ("whole", "tiny"))
    for part in ("student", "teacher", "optimizer", "objective", "objective_optimizer"):
        assert difference(whole[part], resumed[part], part) is None
    assert difference(stopped["objective"], resumed["objective"]) is not None


def test_a_checkpoint_of_the_version_before_goes_on(folder):
    """It may lack entries, and says "unjudged" of an epoch that is still to be validated."""
    settings = ("validation.fraction=0.25", "epochs=2")
    runs.train(folder, "name=whole", *settings)
    runs.train(folder, *settings)
    last = folder / "runs" / "tiny" / "checkpoints" / "epoch-0001.pt"
    state = checkpoint.load(last)
    # As it was when that validation began.
    state |= {"unjudged": True, "best_validation": None}
    del state["pending_validation"], state["best_test"], state["format"]
    checkpoint.save(last.parent, state, best=False, keep=0)
    runs.train(folder, *settings)
    whole, resumed = (result(folder / "runs" / name) | {"metrics": None} for name in ("whole", "tiny"))
    assert difference(whole, resumed) is None


def test_a_finished_run_says_so_and_fresh_makes_a_new_one(folder):
    runs.train(folder)
    before = (folder / "runs" / "tiny" / "metrics.jsonl").read_bytes()
    assert "is finished already" in runs.train(folder).stdout
    assert (folder / "runs" / "tiny" / "metrics.jsonl").read_bytes() == before
    done = runs.train(folder, "--fresh", "max_steps=1")
    assert "runs/tiny-2" in done.stdout
