"""A process per case and rank, tables, and comparison with a baseline."""

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
    time.sleep(case.get("seconds", 0))
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
case = {"folder": sys.argv[1], "threads": 1, "budget": 0}
print(common.run_case("case", 2, case))
print(common.run_case("case", 2, case | {"seconds": 200}))
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(holds) -> bool:
    deadline = time.monotonic() + 100
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)
    return holds()


def test_messages_pass_once_and_ctrl_c_ends_the_ranks(tmp_path: Path) -> None:
    (tmp_path / "case.py").write_text(CASE)

    def ranks() -> list[int]:
        return [int(file.name) for file in tmp_path.iterdir() if file.name.isdigit()]

    with (tmp_path / "out").open("wb") as out:
        bench = Program([str(tmp_path)], code=CALL, cwd=tmp_path, env=runs.environment(), stdout=out, stderr=out)
        try:
            assert wait_until(lambda: len(ranks()) == 4), (tmp_path / "out").read_text()
            assert sum(map(alive, ranks())) == 2
            bench.send_signal(signal.SIGINT)
            assert bench.wait(60) != 0
            assert wait_until(lambda: not any(map(alive, ranks())))
        finally:
            bench.kill()
            for pid in filter(alive, ranks()):
                os.kill(pid, signal.SIGKILL)
    said = (tmp_path / "out").read_text().splitlines()
    assert said[0] == "the CPU decodes the images"
    assert said.count(said[0]) == said.count("KeyboardInterrupt") == 1


def test_a_case_can_fail_die_or_take_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "case.py").write_text(CASE)
    monkeypatch.chdir(tmp_path)
    case = {"folder": str(tmp_path), "threads": 1, "budget": 0}
    with pytest.raises(RunError, match="on purpose"):
        common.run_case("case", 1, case | {"fails": True})
    for world in (1, 2):
        assert "killed" in common.run_case("case", world, case | {"dies": True})[0]["skipped"]
    monkeypatch.setattr(common, "START_SECONDS", 0.5)
    assert "took more than" in common.run_case("case", 1, case | {"seconds": 100})[0]["skipped"]


def test_findings_beside_an_earlier_file(tmp_path: Path):
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps({"meta": {"date": "2026-01-01", "a": 1.0, "b": 1.0, "c": 1.0}, "rows": []}))
    rows = common.compare(earlier, {"a": 1.3, "b": 1.1, "c": 0.7, "d": 5.0})
    assert [(row["finding"], row["verdict"]) for row in rows] == [
        ("a", "worse"), ("b", "alike"), ("c", "better"), ("d", "new"),
    ]  # fmt: skip
    assert rows[0]["change"] == pytest.approx(1.3)
    earlier.write_text("[]")
    with pytest.raises(InputError, match="earlier.json"):
        common.compare(earlier, {"a": 1.0})


def test_a_benchmark_writes_prints_and_judges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"B": 1, "seconds": 0.012345}, {"B": 100, "seconds": 5.0, "error": 1e-7}, {"B": 3, "skipped": "no"}]

    def bench(finding: float, *arguments: object) -> int:
        options = common.parser("").parse_args([*map(str, arguments), "--threads", "2"])
        return common.main(options, lambda _: rows, lambda _: {"share": finding})

    assert bench(1.0, "--json", tmp_path / "b.json") == 0
    assert capsys.readouterr().out.splitlines() == [
        "  B  seconds  error",
        "  1   0.0123       ",
        "100        5  1e-07",
        "  3                  no",
        "share: 1",
    ]
    written = json.loads((tmp_path / "b.json").read_text())
    assert (written["rows"], written["meta"]["threads"], written["meta"]["share"]) == (rows, 2, 1.0)
    assert bench(1.1, "--baseline", tmp_path / "b.json") == 0
    assert bench(1.3, "--baseline", tmp_path / "b.json") == 1
    assert "worse" in capsys.readouterr().out
    assert bench(1.0, "--json", tmp_path / "no" / "x.json") == 2
    assert "its folder does not exist" in capsys.readouterr().err
