"""What a run survives, in short; ``python -m tests.chaos`` does the same at many random moments."""

import random
import time

import pytest

from dist_obdsd import checkpoint
from tests import chaos, runs
from tests.nursery import Program

HANGS = """
import os, sys, time
from dist_obdsd.cli import main as cli
from dist_obdsd.training.train_step import TrainStep
once = TrainStep.__call__
def call(self, batch, progress, *rest):
    if progress.global_step == 4 and os.environ["RANK"] == "1":
        WHAT
    return once(self, batch, progress, *rest)
TrainStep.__call__ = call
cli.program()
"""


@pytest.mark.parametrize(
    ("ranks", "overrides", "plan"),
    [
        (4, (), [("write", 2)]),
        (2, ("strategy=deepspeed", "deepspeed.stage=1", "checkpoint.background=true"), [("step", 1)]),
    ],
    ids=["ddp on 4 ranks", "zero 1 on 2 ranks"],
)
def test_kill_9_changes_no_bit(folder, ranks, overrides, plan):
    overrides = (*overrides, "epochs=6")
    whole = chaos.untouched(folder, "whole", ranks, *overrides, forked=True)
    found, rows = chaos.killed(folder, "killed", ranks, overrides, plan, seed=0, forked=True)
    assert len(rows) == len(plan)
    assert chaos.difference(whole, found) is None
    # The control: a difference would be seen.
    found["student"]["head.bias"][0] += 1e-7
    assert "head.bias" in str(chaos.difference(whole, found))


def test_a_run_moves_between_strategies_and_world_sizes(folder):
    common = (
        "optim.head_scale=2",
        "precision=float32",
        "ranking.name=proxy_anchor",
        "ranking.lr=0.01",
        "epochs=3",
        "optim.clip_norm=1",
    )
    runs.train(folder, "name=whole", *common)
    stops = [(2, "max_steps=7"), (0, "max_steps=14")]
    ways = [("strategy=deepspeed", "deepspeed.stage=1"), ("strategy=deepspeed", "deepspeed.stage=2")]
    for (ranks, stop), way in zip(stops, ways, strict=True):
        runs.train(folder, *common, *way, stop, ranks=ranks)
    runs.train(folder, *common, ranks=2)
    whole, moved = (checkpoint.load(folder / "runs" / name) for name in ("whole", "tiny"))
    assert whole["optimizer"].keys() == moved["optimizer"].keys()
    for name, value in whole["student"].items():
        assert (moved["student"][name] - value).abs().max() < 1e-5
    for name, entry in whole["optimizer"].items():
        assert entry.keys() == moved["optimizer"][name].keys()
        assert entry["step"] == moved["optimizer"][name]["step"]
        assert (moved["optimizer"][name]["exp_avg"] - entry["exp_avg"]).abs().max() < 1e-4
    rows = [[row["ranking"] for row in runs.metrics(folder / "runs" / name, "step")] for name in ("whole", "tiny")]
    assert rows[1] == pytest.approx(rows[0], rel=1e-4)


def test_checkpoints_inside_an_epoch_by_steps_and_by_time_in_the_background(folder):
    more = ("epochs=2", "checkpoint.keep=50")
    done = runs.train(folder, "name=steps", *more, "checkpoint.every_steps=4", "checkpoint.background=true")
    names = sorted(path.name for path in (folder / "runs" / "steps" / "checkpoints").glob("*.pt"))
    assert names == ["epoch-0001.pt", "epoch-0002.pt", "step-00000004.pt", "step-00000008.pt"]
    assert "saved step-00000004.pt: " in done.stdout
    assert "training waited" in done.stdout
    runs.train(folder, "name=minutes", *more, "checkpoint.every_minutes=0.000001")
    steps = len(runs.metrics(folder / "runs" / "minutes", "step"))
    names = [path.name for path in (folder / "runs" / "minutes" / "checkpoints").glob("step-*.pt")]
    assert steps / 4 < len(names) < steps  # asked for in one step, read in the next, written after it
    a, b = (chaos.result(folder / "runs" / name) for name in ("steps", "minutes"))
    assert chaos.difference(a, b) is None


def test_a_signal_during_a_measurement_ends_it_and_the_epoch_is_measured_later(folder):
    more = ("validation.fraction=0.25", "evaluation.batch_size=2", "epochs=3", "evaluation.best_test=true")
    runs.train(folder, "name=whole", *more)
    code = WAITS.replace("EPOCH", "2")
    process = runs.program("train", "tiny.yaml", *more, cwd=folder, code=code)
    assert process.returncode == 0, process.stderr
    run = folder / "runs" / "tiny"
    assert runs.status(run)["state"] == "preempted"
    stopped = checkpoint.load(run)
    assert stopped["pending_validation"]
    assert stopped["position"]["epoch"] == 2
    assert [row["epoch"] for row in runs.metrics(run, "validation")] == [1]
    runs.train(folder, *more)
    assert chaos.difference(chaos.result(folder / "runs" / "whole"), chaos.result(run)) is None


WAITS = """
import os, signal, sys
from dist_obdsd.cli import main as cli
from dist_obdsd.training.model_selection import ModelSelector
once = ModelSelector.after_epoch
def after_epoch(self, epoch):
    if epoch == EPOCH:
        os.kill(os.getpid(), signal.SIGTERM)
    return once(self, epoch)
ModelSelector.after_epoch = after_epoch
cli.program()
"""


@pytest.mark.parametrize("to_launcher", [False, True])
def test_sigterm_leaves_a_checkpoint_a_status_and_no_process(folder, to_launcher):
    row = chaos.terminated(folder, "stopped", 2, to_launcher, random.Random(3))
    assert row["state"] == "preempted", row
    assert row["saved"] is not None
    assert row["left"] == 0


def two_ranks(folder, what: str, *overrides: str) -> tuple[list[int], list[str], float]:
    """Exit codes, outputs and seconds of two ranks of which the second one does ``what`` before its fifth step."""
    code = HANGS.replace("WHAT", what)
    started = time.monotonic()
    logs = [folder / "0.log", folder / "1.log"]
    processes = []
    for log, env in zip(logs, runs.group_environments(2), strict=True):
        with log.open("wb") as out:
            arguments = ("train", "tiny.yaml", "data.workers=0", *overrides)
            processes.append(
                Program(arguments, cwd=folder, env=runs.environment(env), stdout=out, stderr=out, code=code)
            )
    processes[0].wait(timeout=120)
    seconds = time.monotonic() - started
    if "sleep" in what:
        processes[1].kill()
    return [process.wait(timeout=60) for process in processes], [log.read_text() for log in logs], seconds


def test_a_rank_that_hangs_is_named_after_the_timeout(folder):
    codes, (said, _), _ = two_ranks(folder, "time.sleep(300)", "timeout_seconds=5")
    assert codes[0] == 1
    last = said.splitlines()[-1]
    assert "rank 0 on" in last
    assert "at step 4" in last
    assert "rank 1 did not answer within timeout_seconds=5" in last
    status = runs.status(folder / "runs" / "tiny")
    assert status["state"] == "failed"
    assert "rank 1 did not answer" in status["message"]


def test_an_error_on_one_rank_ends_all_and_the_last_lines_say_where(folder):
    codes, outputs, _ = two_ranks(folder, "raise OSError(5, 'the disk said no')")
    assert codes == [1, 1]
    last = outputs[1].splitlines()[-1]
    assert "rank 1 on" in last
    assert "at step 4" in last
    assert "the disk said no" in last
    assert outputs[0].splitlines()[-1] == "rank 0 stops, since another rank is gone"
    assert "the disk said no" in runs.status(folder / "runs" / "tiny")["message"]
