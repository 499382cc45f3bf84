"""Processes of their own for each case, tables, and comparison with a baseline."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from benchmarks import common, loader, objective, step
from dist_obdsd.distributed import collectives
from dist_obdsd.distributed.launch import Runtime
from dist_obdsd.errors import RunError


def _rank(rank: Runtime, case: dict[str, Any]) -> dict[str, Any]:
    if rank.rank == case.get("dies"):
        os.kill(os.getpid(), signal.SIGKILL)
    if rank.rank == case.get("fails"):
        raise ValueError("on purpose")
    return {"ranks": collectives.gather_json(rank.rank), "pid": os.getpid()}


def test_a_case_answers_fails_or_is_killed() -> None:
    case = {"threads": 1}
    (alone,) = common.run_case(_rank, 1, case)
    (answer,) = common.run_case(_rank, 2, case)
    assert (alone["ranks"], answer["ranks"]) == ([0], [0, 1])
    assert len({os.getpid(), alone["pid"], answer["pid"]}) == 3
    with pytest.raises(RunError, match="on purpose"):
        common.run_case(_rank, 2, case | {"fails": 1})
    assert "killed" in common.run_case(_rank, 2, case | {"dies": 1})[0]["skipped"]


def test_a_benchmark_writes_prints_and_judges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"B": 1, "seconds": 0.012345}, {"B": 100, "seconds": 5.0, "error": 1e-7}, {"B": 3, "skipped": "no"}]
    file = tmp_path / "b.json"

    def bench(finding: float, *arguments: object) -> int:
        words = [*map(str, arguments), "--threads", "2"]
        return common.main(common.parser(""), words, lambda _: rows, lambda _: {"share": finding})

    assert bench(1.0, "--json", file) == 0
    assert capsys.readouterr().out.splitlines() == [
        "  B  seconds  error  skipped",
        "  1   0.0123                ",
        "100        5  1e-07         ",
        "  3                       no",
        "finding  now",
        "  share    1",
    ]
    written = json.loads(file.read_text())
    assert (written["rows"], written["meta"]["threads"], written["meta"]["share"]) == (rows, 2, 1.0)
    for finding, code in ((1.1, 0), (1.3, 1), (0.7, 0)):
        assert bench(finding, "--baseline", file) == code
        out, err = capsys.readouterr()
        assert f"share  {finding}       1           {finding}" in out
        assert ("worse than the baseline by more than 20%: share" in err) == (code == 1)
    for content, code, said in (('{"meta": {}}', 0, "share"), ("[]", 2, "b.json was not written by a benchmark")):
        file.write_text(content)
        assert bench(1.0, "--baseline", file) == code
        assert said in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("benchmark", "arguments", "fact"),
    [
        (step, "--batch 7", "--batch is 7"),
        (objective, "--sizes 16 --worlds 3", "--sizes has 16, which 3 ranks cannot share equally; give multiples of 3"),
        (loader, "--shards {} --batch 15", "batch.global_size=15"),
    ],
)
def test_a_batch_that_cannot_be_made_is_refused(benchmark, arguments: str, fact: str, shards: Path, capfd) -> None:
    assert benchmark.main(arguments.format(shards).split()) == 2
    assert fact in capfd.readouterr().err
