"""Kills, hangs, errors and full disks, in short; ``python -m tests.chaos`` kills at many random moments."""

import os
import signal
import subprocess

import pytest

from dist_obdsd import checkpoint
from dist_obdsd.training.run_dir import Attempt
from tests import chaos, runs

SETTINGS = (*chaos.SETTINGS, "epochs=2", "precision=float64", "timeout_seconds=600")  # 6 steps, a checkpoint after two
IN_A_WRITE = """
import os, signal
from dist_obdsd import checkpoint
from dist_obdsd.cli import main as cli
once = checkpoint.torch.save
def save(state, file):
    if state["position"]["global_step"] == 6:
        file.write(b"half a file")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    once(state, file)
checkpoint.torch.save = save
cli.program()
"""
IN_A_STEP = runs.at_step("os.kill(os.getpid(), signal.SIGKILL)", 5, rank=1)
ZERO = ("strategy=deepspeed", "deepspeed.stage=1", "precision=float32")


@pytest.mark.parametrize(
    ("ranks", "overrides", "code"),
    [(4, (), IN_A_WRITE), (2, ZERO, IN_A_STEP), (2, ("strategy=fsdp",), IN_A_STEP)],
    ids=["ddp on 4 ranks, in a write", "zero 1 on 2 ranks, in a step", "fsdp on 2 ranks, in a step"],
)
def test_kill_9_changes_no_bit(folder, run, untouched, ranks, overrides, code):
    overrides = (*SETTINGS, *overrides)
    runs.train(folder, *overrides, ranks=ranks, code=code, exits=None)
    assert runs.status(run)["state"] in ("running", "failed")  # nobody, or a rank that was left alone, could tell
    assert checkpoint.load(run)["position"]["global_step"] == 4
    assert any((run / "checkpoints").glob(".*.writing")) == (code == IN_A_WRITE)
    assert "resuming" in runs.train(folder, *overrides, ranks=ranks).stdout
    assert not any((run / "checkpoints").glob(".*.writing"))
    whole, found = chaos.result(untouched(*overrides, ranks=ranks)), chaos.result(run)
    assert chaos.difference(whole, found) is None
    if "strategy=fsdp" in overrides:
        alone = chaos.result(untouched(*SETTINGS))
        assert found["summary"] == alone["summary"]
        assert any(row["protocol"] == "best_validation" for row in alone["summary"])
        assert all((found["student"][name] - value).abs().max() < 1e-9 for name, value in alone["student"].items())
    # The control: a difference would be seen.
    found["student"]["head.bias"][0] += 1e-7
    assert "head.bias" in str(chaos.difference(whole, found))


def test_a_run_moves_between_strategies_and_world_sizes(folder, run, untouched):
    objective = ("ranking.name=proxy_anchor", "ranking.lr=0.01", "optim.head_scale=2", "optim.clip_norm=1")
    common = (*objective, "precision=float32", "epochs=2")
    runs.train(folder, *common, "max_steps=3")
    runs.train(folder, *common, "strategy=fsdp", "max_steps=7", ranks=2)
    runs.train(folder, *common, "strategy=deepspeed", "deepspeed.stage=2", "max_steps=10", ranks=2)
    runs.train(folder, *common, ranks=2)
    assert "finished already" in runs.train(folder, *common).stdout
    folders = untouched(*common), run
    whole, moved = map(checkpoint.load, folders)
    assert whole["optimizer"].keys() == moved["optimizer"].keys()
    for name, value in whole["student"].items():
        assert (moved["student"][name] - value).abs().max() < 1e-5
    for name, entry in whole["optimizer"].items():
        assert entry.keys() == moved["optimizer"][name].keys()
        assert entry["step"] == moved["optimizer"][name]["step"]
        assert (moved["optimizer"][name]["exp_avg"] - entry["exp_avg"]).abs().max() < 1e-4
    rows = [[row["ranking"] for row in runs.metrics(folder, "step")] for folder in folders]
    assert rows[1] == pytest.approx(rows[0], rel=1e-4)


def test_a_second_ctrl_c_kills(folder):
    twice = runs.at_step("os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGINT)", 4)
    runs.train(folder, code=twice, exits=-signal.SIGINT)


def test_a_rank_of_an_earlier_attempt_does_not_write_the_status(tmp_path):
    earlier, later = Attempt(tmp_path), Attempt(tmp_path)
    earlier.write_status("running", "")
    later.write_status("running", "")
    earlier.write_failure("too late")
    assert runs.status(tmp_path)["state"] == "running"
    later.write_failure("the cause")
    later.write_failure("what follows from it")
    assert (runs.status(tmp_path)["state"], runs.status(tmp_path)["message"]) == ("failed", "the cause")


def facts(folder, *what: str) -> tuple[list[int], list[str], str]:
    """Exit codes, last lines and the status of two ranks that do ``what`` before their fifth step."""
    code = [runs.at_step(its, 4, rank) for rank, its in enumerate(what)]
    codes, outputs = runs.two_ranks(folder, [[], []], code)
    status = runs.status(folder / "runs" / "tiny")
    assert status["state"] == "failed"
    return codes, [output.splitlines()[-1] for output in outputs if output], status["message"]


def test_a_rank_that_hangs_is_named_after_the_timeout(folder):
    # Until then a rank may be as slow as it likes.
    now = "from datetime import timedelta; from torch.distributed import distributed_c10d as c10d"
    codes, (last, *_), message = facts(folder, f"{now}; c10d._set_pg_timeout(timedelta(seconds=3))", "time.sleep(3600)")
    assert codes[0] == 1
    for fact in ("rank 0 on", "at step 4", "rank 1 did not answer", "timeout_seconds=600"):
        assert fact in last
    assert "rank 1 did not answer" in message


def test_an_error_on_one_rank_ends_all_and_says_where(folder):
    codes, lasts, message = facts(folder, "pass", "raise OSError(5, 'the disk said no')")
    assert codes == [1, 1]
    for rank, fact in ((0, "another rank is lost"), (1, "the disk said no")):
        for part in (f"rank {rank} on", "at step 4", fact):
            assert part in lasts[rank]
    assert "the disk said no" in message


ON_A_DISK = ("epochs=2", "precision=float32", "checkpoint.keep=1")  # 12 steps, checkpoints of 3.3 MiB


def resize(disk, mib):
    subprocess.run(["mount", "-o", f"remount,size={mib}m", str(disk)], check=True)


def test_a_full_disk_ends_the_run_and_later_it_goes_on(train, small_disk, untouched):
    resize(small_disk, 5)
    run, command = small_disk / "tiny", (*ON_A_DISK, f"output={small_disk}")
    (line,) = train(*command, exits=1).stderr.splitlines()
    assert f"cannot write the checkpoint {run}/checkpoints/epoch-0002.pt: No space left on device, since 3," in line
    assert " bytes are needed and " in line
    assert "bytes are free; the previous one is intact, so free some space and start the same command again" in line
    status = runs.status(run)
    assert status["state"] == "failed"
    assert "epoch-0002" in status["message"]
    assert checkpoint.find(run).name == "epoch-0001.pt"
    assert checkpoint.load(run)["position"]["global_step"] == 6
    assert not list((run / "checkpoints").glob(".*"))

    resize(small_disk, 20)
    assert "from epoch-0001.pt" in train(*command).stdout
    assert chaos.difference(chaos.result(untouched(*ON_A_DISK)), chaos.result(run)) is None


def test_a_disk_that_is_full_during_an_epoch_is_told(train, small_disk):
    run, page = small_disk / "tiny", os.sysconf("SC_PAGESIZE")
    # status.json, config.yaml and provenance.json take one page each, and then there is none for metrics.jsonl.
    (small_disk / "filler").write_bytes(bytes(2**20 - 3 * page))
    (line,) = train(*ON_A_DISK, f"output={small_disk}", exits=1).stderr.splitlines()
    assert f"cannot write {run}/metrics.jsonl: No space left on device" in line
    assert "0 bytes are free" in line
