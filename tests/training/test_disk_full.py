"""A disk that is full, as a small file system of its own: what is said, what is left, and how it goes on."""

import os
import subprocess
from pathlib import Path

from dist_obdsd import checkpoint
from tests import chaos, runs

SETTINGS = ("epochs=2", "precision=float32", "checkpoint.keep=1")  # 12 steps, checkpoints of 3.3 MiB


def resize(disk: Path, mib: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={mib}m", str(disk)], check=True)


def test_a_full_disk_ends_the_run_and_later_it_goes_on(train, small_disk, untouched):
    resize(small_disk, 5)
    run, command = small_disk / "tiny", (*SETTINGS, f"output={small_disk}")
    code, _, said = train(*command)
    assert code == 1
    (line,) = said.splitlines()
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
    code, out, _ = train(*command)
    assert code == 0
    assert "from epoch-0001.pt" in out
    assert chaos.difference(chaos.result(untouched(*SETTINGS)), chaos.result(run)) is None


def test_a_disk_that_is_full_during_an_epoch_is_told(train, small_disk):
    run, page = small_disk / "tiny", os.sysconf("SC_PAGESIZE")
    # status.json, config.yaml and provenance.json take one page each, and then there is none for metrics.jsonl.
    (small_disk / "filler").write_bytes(bytes(2**20 - 3 * page))
    code, _, err = train(*SETTINGS, f"output={small_disk}")
    assert code == 1
    (line,) = err.splitlines()
    assert f"cannot write {run}/metrics.jsonl: No space left on device" in line
    assert "0 bytes are free" in line
