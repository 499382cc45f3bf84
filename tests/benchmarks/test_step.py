"""The benchmark of the step on sizes that take seconds, and what it computes from its figures."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import step
from benchmarks.step import PARTS, WAIT, StepTimer
from tests import runs


def test_variants_are_divided_into_parts_on_real_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = step.main(["--worlds", "1,2", "--batch", "8", "--dim", "16", "--image-size", "16", "--budget", "3",
                      "--json", f"{tmp_path}/step.json", "--trace", f"{tmp_path}/trace.json"])  # fmt: skip
    assert code == 0
    rows = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert [(row["W"], row["B"], row["variant"]) for row in rows] == [
        (W, 8 * W, variant) for W in (1, 2) for variant in ("none", "psd", "obdsd")
    ]
    for row in rows:
        assert row["images_per_s"] == pytest.approx(1000 * row["B"] / row["ms"])
        assert all(row[part] > 0 for part in PARTS if part != "teacher")
        assert (row["teacher"] > 0) == (row["variant"] != "none")
        assert row["mfu"] > 0
    for none, psd, obdsd in (rows[:3], rows[3:]):
        assert none["overhead"] == 1
        for row in (psd, obdsd):
            assert row["overhead"] == pytest.approx(row["ms"] / none["ms"])
            assert row["excess"] == pytest.approx((row["ms"] - none["ms"]) / row["teacher"])
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert "aten::convolution_backward" in names
    assert "excess of obdsd on 2 ranks" in capsys.readouterr().out


def test_batches_from_shards_and_a_failed_compilation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.make_images(tmp_path / "images")
    packed = runs.program("pack", "folder", "--source", "images", "--out", "packed", cwd=tmp_path)
    assert packed.returncode == 0, packed.stderr
    monkeypatch.setenv("PATH", "/no/such/folder")  # no compiler
    code = step.main(["--worlds", "1", "--batch", "8", "--dim", "16", "--image-size", "16", "--budget", "2",
                      "--json", f"{tmp_path}/step.json", "--shards", f"{tmp_path}/packed", "--workers", "1",
                      "--compile"])  # fmt: skip
    assert code == 0
    assert "model.compile=true" in capsys.readouterr().err
    none, psd, obdsd = json.loads((tmp_path / "step.json").read_text())["rows"]
    for row in (none, psd, obdsd):
        assert 0 < row[WAIT] < row["ms"]
        assert row["objective"] > 0
        assert row["compiled"] is False
    assert obdsd["teacher"] > 0


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--shards", "nowhere"], "nowhere"),
        (["--batch", "7"], "--batch is 7"),
        (["--backbone", "vgg"], "model.backbone"),
        (["--precision", "float16"], "precision"),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert step.main(arguments) == 2
    assert word in capsys.readouterr().err


class Machine:
    def work(self, result: float) -> float:
        clock.now += result
        return result


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


clock = Clock()


def test_a_timer_gives_every_call_to_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "time", clock)
    timer, machine, seen = StepTimer(torch.device("cpu")), Machine(), []
    timer.time_calls(machine, "work", "busy", seen.append)
    timer.mark("between")
    for _ in range(2):
        assert machine.work(2.0) == 2.0
    clock.now += 3.0
    timer.mark("other")
    assert seen == [2.0, 2.0]
    assert timer.seconds() == {"busy": 4.0, "other": 3.0}
    assert timer.seconds() == {}
