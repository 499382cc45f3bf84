"""A process per case and rank, tables, and comparison with a baseline."""

import argparse
import json
import os
import signal
import time
from pathlib import Path

import pytest

from benchmarks import common
from dist_obdsd.errors import InputError, RunError
from tests import runs
from tests.nursery import Program

CASE = """
import os, sys, time
def run_rank(rank, case):
    sys.stderr.write("the CPU decodes the images\\n")
    open(f"{case['folder']}/{os.getpid()}", "w").close()
    time.sleep(case["seconds"])
    if case.get("fails"):
        raise ValueError("on purpose")
    if case.get("dies"):
        os.kill(os.getpid(), 9)
    return []
"""
CALL = """
import os, sys
os.environ.pop("OMP_NUM_THREADS")  # so that torchrun would say what it sets
from benchmarks import common
case = {"folder": sys.argv[1], "seconds": float(sys.argv[2]), "threads": 1, "budget": 0}
print(common.run_case("case", 2, case))
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def has_ended(pids: list[int]) -> bool:
    deadline = time.monotonic() + 60
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))


def found(folder: Path) -> list[int]:
    return [int(file.name) for file in folder.iterdir() if file.name.isdigit()]


def test_what_ranks_say_is_passed_on_once(tmp_path: Path) -> None:
    (tmp_path / "case.py").write_text(CASE)
    done = runs.program(str(tmp_path), "0", code=CALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
    assert done.stderr == "the CPU decodes the images\n"


def test_ctrl_c_ends_the_ranks(tmp_path: Path) -> None:
    (tmp_path / "case.py").write_text(CASE)
    with (tmp_path / "out").open("wb") as out:
        bench = Program([str(tmp_path), "200"], code=CALL, cwd=tmp_path, env=runs.environment(), stdout=out, stderr=out)
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


@pytest.mark.parametrize("world", [1, 2])
def test_a_case_can_fail_die_or_take_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    (tmp_path / "case.py").write_text(CASE)
    monkeypatch.chdir(tmp_path)
    case = {"folder": str(tmp_path), "seconds": 0, "threads": 1, "budget": 0}
    with pytest.raises(RunError, match="on purpose"):
        common.run_case("case", world, case | {"fails": True})
    assert "killed" in common.run_case("case", world, case | {"dies": True})["skipped"]
    monkeypatch.setattr(common, "START_SECONDS", 0.5)
    assert "took more than" in common.run_case("case", world, case | {"seconds": 100})["skipped"]


def test_findings_beside_an_earlier_file(tmp_path: Path):
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps({"meta": {"date": "2026-01-01", "a": 1.0, "b": 1.0, "c": 1.0}, "rows": []}))
    rows = common.compare(earlier, {"a": 1.3, "b": 1.1, "c": 0.7, "d": 5.0}, tolerance=0.2)
    assert [(row["finding"], row["verdict"]) for row in rows] == [
        ("a", "worse"), ("b", "alike"), ("c", "better"), ("d", "new"),
    ]  # fmt: skip
    assert rows[0]["change"] == pytest.approx(1.3)
    earlier.write_text("[]")
    with pytest.raises(InputError, match="earlier.json"):
        common.compare(earlier, {"a": 1.0}, tolerance=0.2)


def test_a_table_and_its_machine():
    text = common.table(
        [{"B": 1, "seconds": 0.012345}, {"B": 100, "seconds": 5.0, "error": 1e-7}, {"B": 3, "skipped": "no"}]
    )
    assert text.splitlines() == [
        "  B  seconds  error",
        "  1   0.0123       ",
        "100        5  1e-07",
        "  3                  no",
    ]
    about = common.meta(argparse.Namespace(threads=2))
    assert about["threads"] == 2
    assert about["device"]
