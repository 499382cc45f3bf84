"""Benches' ranks under torchrun: what they say arrives, and they end with whoever started them."""

import os
import signal
import time
from pathlib import Path

from tests import runs
from tests.nursery import Program

CASE = """
import json, os, sys, time
folder, seconds = json.loads(sys.argv[1])
sys.stderr.write("the CPU decodes the images\\n")  # as ``step.say``
open(f"{folder}/{os.getpid()}", "w").close()
time.sleep(seconds)
if os.environ["RANK"] == "0":
    print("[]")
"""
CALL = """
import os, sys
os.environ.pop("OMP_NUM_THREADS")  # so that torchrun would say what it sets
from benchmarks import ranks
ranks.START_SECONDS = float(sys.argv[3])
print(ranks.on_ranks("case", 2, [sys.argv[1], float(sys.argv[2])], 0))
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def has_ended(pids: list[int]) -> bool:
    deadline = time.monotonic() + 5
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))


def found(folder: Path) -> list[int]:
    return [int(file.name) for file in folder.iterdir() if file.name.isdigit()]


def test_what_ranks_say_is_passed_on_once(tmp_path: Path) -> None:
    (tmp_path / "case.py").write_text(CASE)
    done = runs.program(str(tmp_path), "0", "100", code=CALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
    assert done.stderr == "the CPU decodes the images\n"


def test_ctrl_c_ends_the_ranks(tmp_path: Path) -> None:
    (tmp_path / "case.py").write_text(CASE)
    with (tmp_path / "out").open("wb") as out:
        bench = Program(
            [str(tmp_path), "200", "300"], code=CALL, cwd=tmp_path, env=runs.environment(), stdout=out, stderr=out
        )
        try:
            deadline = time.monotonic() + 100
            while len(ranks := found(tmp_path)) < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
            assert len(ranks) == 2, (tmp_path / "out").read_text()
            assert all(map(alive, ranks))
            bench.send_signal(signal.SIGINT)
            assert bench.wait(60) != 0
            assert has_ended(ranks)
        finally:
            bench.kill()
            for pid in filter(alive, found(tmp_path)):
                os.kill(pid, signal.SIGKILL)
    assert "KeyboardInterrupt" in (tmp_path / "out").read_text()
