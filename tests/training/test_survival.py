"""Kills, signals and hangs, in short; ``python -m tests.chaos`` does the same at many random moments."""

import os
import random
import signal
import time

import pytest

from dist_obdsd import checkpoint
from dist_obdsd.training.run_dir import Attempt
from tests import chaos, runs
from tests.nursery import Program

WRITES = """
import os, signal
from dist_obdsd import checkpoint
from dist_obdsd.cli import main as cli
once = checkpoint.torch.save
def save(state, file):
    if state["position"]["global_step"] == 8:
        file.write(b"half a file")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    once(state, file)
checkpoint.torch.save = save
cli.program()
"""


@pytest.mark.parametrize(
    ("ranks", "overrides", "code"),
    [
        (4, (), WRITES),
        (
            2,
            ("strategy=deepspeed", "deepspeed.stage=1", "checkpoint.background=true"),
            runs.at_step("os.kill(os.getpid(), signal.SIGKILL)", 7, rank=1),
        ),
    ],
    ids=["ddp on 4 ranks, in a write", "zero 1 on 2 ranks, in a step"],
)
def test_kill_9_changes_no_bit(folder, ranks, overrides, code):
    overrides = (*chaos.SETTINGS, *overrides, "epochs=6", "timeout_seconds=600")
    runs.train(folder, "name=whole", *overrides, ranks=ranks)
    assert runs.program("train", "tiny.yaml", *overrides, ranks=ranks, cwd=folder, code=code).returncode != 0
    folders = [folder / "runs" / name for name in ("whole", "tiny")]
    assert checkpoint.load(folders[1])["position"]["global_step"] == 6
    assert any((folders[1] / "checkpoints").glob(".*.writing")) == (code == WRITES)
    assert "resuming" in runs.train(folder, *overrides, ranks=ranks).stdout
    assert not any((folders[1] / "checkpoints").glob(".*.writing"))
    whole, found = map(chaos.result, folders)
    assert chaos.difference(whole, found) is None
    # The control: a difference would be seen.
    found["student"]["head.bias"][0] += 1e-7
    assert "head.bias" in str(chaos.difference(whole, found))


def test_a_run_moves_between_strategies_and_world_sizes(folder):
    common = (
        "optim.head_scale=2", "precision=float32", "ranking.name=proxy_anchor", "ranking.lr=0.01", "epochs=3",
        "optim.clip_norm=1",
    )  # fmt: skip
    runs.train(folder, "name=whole", *common)
    runs.train(folder, *common, "max_steps=4")
    runs.train(folder, *common, "strategy=fsdp", "max_steps=9", ranks=2)
    runs.train(folder, *common, "strategy=deepspeed", "deepspeed.stage=2", "max_steps=14", ranks=2)
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


def test_checkpoints_inside_an_epoch_by_steps_and_by_time(folder):
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


STOPS = """
import os, signal
from dist_obdsd.cli import main as cli
from dist_obdsd.training.model_selection import ModelSelector
once = ModelSelector.after_epoch
def after_epoch(self, epoch):
    if epoch == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return once(self, epoch)
ModelSelector.after_epoch = after_epoch
cli.program()
"""


def test_an_epoch_whose_validation_is_stopped_is_validated_later(folder):
    more = ("validation.fraction=0.25", "evaluation.batch_size=2", "epochs=3", "evaluation.best_test=true")
    runs.train(folder, "name=whole", *more)
    process = runs.program("train", "tiny.yaml", *more, cwd=folder, code=STOPS)
    assert process.returncode == os.EX_TEMPFAIL, process.stderr
    run = folder / "runs" / "tiny"
    assert runs.status(run)["state"] == "preempted"
    stopped = checkpoint.load(run)
    assert stopped["pending_validation"]
    assert stopped["position"]["epoch"] == 2
    assert [row["epoch"] for row in runs.metrics(run, "validation")] == [1]
    runs.train(folder, *more)
    assert chaos.difference(chaos.result(folder / "runs" / "whole"), chaos.result(run)) is None


@pytest.mark.parametrize("how", ["Ctrl-C", "a stop file"])
def test_a_request_to_stop_saves_and_exits_with_75(folder, how):
    run, log = folder / "runs" / "tiny", folder / "log"
    with log.open("wb") as out:
        program = Program(
            ("train", "tiny.yaml", "epochs=400"), cwd=folder, env=runs.environment(), stdout=out, stderr=out
        )
        while chaos._steps(run) < 5:
            assert program.poll() is None, log.read_text()
            time.sleep(0.02)
        if how == "Ctrl-C":
            program.send_signal(signal.SIGINT)
        else:
            assert runs.program("stop", "tiny.yaml", cwd=folder).returncode == 0
        assert program.wait(runs.SECONDS) == os.EX_TEMPFAIL, log.read_text()
    status = runs.status(run)
    assert status["state"] == "preempted"
    assert ("SIGINT" if how == "Ctrl-C" else "runs/tiny/stop") in status["message"]
    assert not (run / "stop").exists()
    state = [runs.program("status", "tiny.yaml", "--since", since, cwd=folder).stdout for since in ("1", "9e9")]
    assert state == ["preempted\n", "none\n"]
    assert "resuming" in runs.train(folder, "epochs=400", f"max_steps={chaos._steps(run) + 1}").stdout


def test_a_second_ctrl_c_kills(folder):
    twice = runs.at_step("os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGINT)", 4)
    assert runs.program("train", "tiny.yaml", cwd=folder, code=twice).returncode == -signal.SIGINT


def test_a_rank_of_an_earlier_attempt_does_not_write_the_status(tmp_path):
    earlier, later = Attempt(tmp_path), Attempt(tmp_path)
    earlier.write_status("running", "")
    later.write_status("running", "")
    earlier.write_failure("too late")
    assert runs.status(tmp_path)["state"] == "running"
    later.write_failure("the cause")
    later.write_failure("what follows from it")
    assert (runs.status(tmp_path)["state"], runs.status(tmp_path)["message"]) == ("failed", "the cause")


@pytest.mark.parametrize("to_launcher", [False, True])
def test_sigterm_leaves_a_checkpoint_a_status_and_no_process(folder, to_launcher):
    row = chaos.terminated(folder, "stopped", 2, to_launcher, random.Random(3), ("timeout_seconds=600",))
    assert row["state"] == "preempted", row
    assert row["saved"] is not None
    assert row["left"] == 0


def two_ranks(folder, *what: str) -> tuple[list[int], list[str]]:
    """Exit codes and outputs of two ranks that do ``what`` before their fifth step."""
    logs, processes = [folder / "0.log", folder / "1.log"], []
    for rank, (log, env) in enumerate(zip(logs, runs.group_environments(2), strict=True)):
        with log.open("wb") as out:
            arguments, code = ("train", "tiny.yaml", "data.workers=0"), runs.at_step(what[rank], 4, rank)
            processes.append(
                Program(arguments, cwd=folder, env=runs.environment(env), stdout=out, stderr=out, code=code)
            )
    processes[0].wait(timeout=runs.SECONDS)
    if "sleep" in what[1]:
        processes[1].kill()
    return [process.wait(timeout=runs.SECONDS) for process in processes], [log.read_text() for log in logs]


def test_a_rank_that_hangs_is_named_after_the_timeout(folder):
    # Until then a rank may be as slow as it likes.
    now = "from datetime import timedelta; from torch.distributed import distributed_c10d as c10d"
    shorter = f"{now}; c10d._set_pg_timeout(timedelta(seconds=3))"
    codes, (output, _) = two_ranks(folder, shorter, "time.sleep(3600)")
    assert codes[0] == 1
    last = output.splitlines()[-1]
    for fact in ("rank 0 on", "at step 4", "rank 1 did not answer", "timeout_seconds=600"):
        assert fact in last
    status = runs.status(folder / "runs" / "tiny")
    assert status["state"] == "failed"
    assert "rank 1 did not answer" in status["message"]


def test_an_error_on_one_rank_ends_all_and_says_where(folder):
    codes, outputs = two_ranks(folder, "pass", "raise OSError(5, 'the disk said no')")
    assert codes == [1, 1]
    last = outputs[1].splitlines()[-1]
    for fact in ("rank 1 on", "at step 4", "the disk said no"):
        assert fact in last
    last = outputs[0].splitlines()[-1]
    for fact in ("rank 0 on", "at step 4", "another rank is lost"):
        assert fact in last
    assert "the disk said no" in runs.status(folder / "runs" / "tiny")["message"]
