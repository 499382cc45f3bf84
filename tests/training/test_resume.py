"""Runs that are killed, stopped or started again."""

import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch

from dist_obdsd import checkpoint
from tests import runs
from tests.nursery import Program


def weights(run: Path) -> dict[str, torch.Tensor]:
    state = checkpoint.load(run)
    moments = {f"{name}.{key}": t for name, entry in state["optimizer"].items() for key, t in entry.items()}
    return state["student"] | state["teacher"]["network"] | moments


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def wait_for(text: str, folder: Path, process: subprocess.Popen[bytes] | Program) -> None:
    """Return when the metrics file holds ``text``."""
    record = folder / "runs" / "tiny" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (record.exists() and text in record.read_text()):
        assert process.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_killed_and_restarted_ends_with_the_same_bits(folder):
    """Each in a process that was started anew. On several ranks, and with DeepSpeed: test_survival."""
    runs.train(folder, "name=whole", "epochs=4", anew=True)
    with (folder / "log").open("wb") as out:
        process = subprocess.Popen(
            runs.command("train", "tiny.yaml", "epochs=4"), cwd=folder, env=runs.environment(), stdout=out,
            stderr=out, start_new_session=True,
        )  # fmt: skip
    wait_for('"step": 13,', folder, process)
    for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        member.kill()
    process.wait(timeout=60)
    assert (folder / "runs" / "tiny" / "checkpoints" / "last").exists()
    assert runs.status(folder / "runs" / "tiny")["state"] == "running"
    done = runs.train(folder, "epochs=4", anew=True)
    assert "resuming" in done.stdout
    whole, resumed = folder / "runs" / "whole", folder / "runs" / "tiny"
    assert same_bits(weights(whole), weights(resumed))
    keep = ("step", "epoch", "ranking", "distillation", "grad_norm", "lr")
    assert [[row.get(k) for k in keep] for row in runs.metrics(whole, "step")] == [
        [row.get(k) for k in keep] for row in runs.metrics(resumed, "step")
    ]


def test_a_signal_stops_between_steps_and_the_same_command_goes_on(folder):
    runs.train(folder, "name=whole", ranks=2)
    with (folder / "log").open("wb") as out:
        ranks = [
            Program(["train", "tiny.yaml"], cwd=folder, env=runs.environment(env), stdout=out, stderr=out)
            for env in runs.group_environments(2)
        ]
    wait_for('"step": 7,', folder, ranks[0])
    # To one rank only: the others learn of it from the step's all-reduce.
    ranks[1].send_signal(signal.SIGUSR1)
    assert [rank.wait(timeout=60) for rank in ranks] == [0, 0], (folder / "log").read_text()
    assert runs.status(folder / "runs" / "tiny")["state"] == "preempted"
    assert checkpoint.load(folder / "runs" / "tiny")["position"]["step"] > 0
    runs.train(folder, ranks=2)
    assert same_bits(weights(folder / "runs" / "whole"), weights(folder / "runs" / "tiny"))


def test_a_run_goes_on_with_another_number_of_ranks(folder):
    runs.train(folder, "name=whole")
    runs.train(folder, "max_steps=7", ranks=2)
    runs.train(folder, ranks=0)
    a, b = weights(folder / "runs" / "whole"), weights(folder / "runs" / "tiny")
    assert all((a[name] - b[name]).abs().max() < 1e-9 for name in a)


@pytest.mark.parametrize(
    "settings",
    [
        ["ranking.name=margin", "ranking.lr=0.01", "distillation.memory=24", "distillation.solver=cg"],
        ["ranking.name=proxy_anchor", "ranking.lr=0.01", "batch.chunk=3"],
        ["ranking.name=pml.SoftTripleLoss", "ranking.miner=pml.UniformHistogramMiner", "optim.name=sgd"],
    ],
    ids=["margin, memory", "proxies, chunks", "pytorch-metric-learning"],
)
def test_the_objective_s_own_state_is_resumed_inside_an_epoch(folder, settings):
    runs.train(folder, "name=whole", *settings)
    runs.train(folder, *settings, "max_steps=9")
    stopped = checkpoint.load(folder / "runs" / "tiny")
    assert stopped["position"]["step"] > 0
    assert stopped["objective"]
    assert stopped["objective_optimizer"].keys() <= stopped["objective"].keys()
    assert (stopped["manifold_memory"] is not None) == ("distillation.memory=24" in settings)
    runs.train(folder, *settings)
    whole, resumed = (checkpoint.load(folder / "runs" / name) for name in ("whole", "tiny"))
    assert same_bits(weights(folder / "runs" / "whole"), weights(folder / "runs" / "tiny"))
    assert same_bits(whole["objective"], resumed["objective"])
    assert not same_bits(stopped["objective"], resumed["objective"])
    for name, entry in whole["objective_optimizer"].items():
        assert same_bits(entry, resumed["objective_optimizer"][name])


def test_a_finished_run_says_so_and_fresh_makes_a_new_one(folder):
    runs.train(folder)
    before = (folder / "runs" / "tiny" / "metrics.jsonl").read_bytes()
    assert "is finished already" in runs.train(folder).stdout
    assert (folder / "runs" / "tiny" / "metrics.jsonl").read_bytes() == before
    done = runs.train(folder, "--fresh", "max_steps=1")
    assert "runs/tiny-2" in done.stdout


def test_other_settings_are_refused_in_a_run_folder_that_exists(folder):
    runs.train(folder, "max_steps=1")
    done = runs.train(folder, "optim.lr=0.5", code=2)
    assert "optim.lr: 0.001 -> 0.5" in done.stderr
