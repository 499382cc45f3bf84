"""The benchmark of the step on sizes that take seconds, and what it computes from its figures."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import step
from benchmarks.step import PARTS, StepTimer

VARIANTS = ("none", "psd", "obdsd 1", "obdsd 0.005")


def test_variants_are_divided_into_parts_on_real_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = step.main(["model.embedding_dim=16", "--worlds", "1,2", "--batch", "8", "data.image_size=16",
                      "--budget", "3", "--temperatures", "1,0.005", "--json", f"{tmp_path}/step.json",
                      "--trace", f"{tmp_path}/trace.json"])  # fmt: skip
    assert code == 0
    rows = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert [(row["W"], row["B"], row["variant"]) for row in rows] == [
        (W, 8 * W, variant) for W in (1, 2) for variant in VARIANTS
    ]
    for row in rows:
        assert row["images_per_s"] == pytest.approx(1000 * row["B"] / row["ms"])
        assert all(row[part] > 0 for part in PARTS if part != "teacher")
        assert (row["teacher"] > 0) == (row["variant"] != "none")
    for none, *others in (rows[:4], rows[4:]):
        assert none["overhead"] == 1
        for row in others:
            assert row["overhead"] == pytest.approx(row["ms"] / none["ms"])
            assert row["excess"] == pytest.approx((row["ms"] - none["ms"]) / row["teacher"])
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert "aten::convolution_backward" in names
    assert "excess of obdsd 0.005 on 2 ranks" in capsys.readouterr().out


class Machine:
    now = 0.0

    def work(self, result: float) -> float:
        self.now += result
        return result

    def both(self) -> None:
        self.now += 1.0
        self.work(4.0)
        self.now += 2.0


def test_a_timer_gives_every_call_to_its_part() -> None:
    machine, seen = Machine(), []
    timer = StepTimer(torch.device("cpu"), lambda: machine.now)
    timer.time_calls(machine, "work", "busy", seen.append)
    timer.time_calls(machine, "both", "whole")
    timer.mark("other")
    machine.work(2.0)
    machine.both()  # without the timed call inside
    machine.now += 3.0
    timer.mark("other")
    assert seen == [2.0, 4.0]
    assert timer.seconds() == {"busy": 6.0, "whole": 3.0, "other": 3.0}
    assert timer.seconds() == {}
