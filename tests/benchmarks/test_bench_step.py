"""``bench step`` on sizes that take seconds, and what it computes from its figures."""

import argparse
import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks import projection, step
from benchmarks.step import PARTS, WAIT, Split
from dist_obdsd.distributed.launch import Launch, Runtime
from tests import runs


def test_arms_are_divided_into_their_parts_on_real_ranks(tmp_path: Path) -> None:
    done = runs.program("bench", "step", "--worlds", "1,2", "--batch", "8", "--dim", "16", "--image-size", "16",
                        "--budget", "3", "--json", "bench.json", "--trace", "trace.json", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    measured, projected = rows[:6], rows[6:]
    assert [(row["W"], row["B"], row["arm"]) for row in measured] == [
        (W, 8 * W, arm) for W in (1, 2) for arm in ("none", "psd", "obdsd")
    ]
    for row in measured:
        assert row["images_per_s"] == pytest.approx(1000 * row["B"] / row["ms"])
        assert all(row[part] > 0 for part in PARTS if part != "teacher")
        assert (row["teacher"] > 0) == (row["arm"] != "none")
        assert 0 < row["mfu"] < 1
    for none, psd, obdsd in (measured[:3], measured[3:]):
        assert none["overhead"] == 1
        for row in (psd, obdsd):
            assert row["overhead"] == pytest.approx(row["ms"] / none["ms"])
            assert row["excess"] == pytest.approx((row["ms"] - none["ms"]) / row["teacher"])
    assert [(row["W"], row["B"]) for row in projected] == [(8, 64), (64, 512), (512, 4096)]
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert "aten::convolution_backward" in names
    assert "excess of obdsd on 2 ranks" in done.stdout


def test_batches_come_from_shards_and_what_cannot_be_compiled_is_said_and_marked(tmp_path: Path) -> None:
    runs.make_images(tmp_path / "images")
    packed = runs.program("pack", "folder", "--source", "images", "--out", "packed", cwd=tmp_path)
    assert packed.returncode == 0, packed.stderr
    done = runs.program("bench", "step", "--worlds", "1", "--batch", "8", "--dim", "16", "--image-size", "16",
                        "--budget", "2", "--json", "bench.json", "--shards", "packed", "--workers", "1",
                        "--compile", cwd=tmp_path, env={"PATH": "/no/such/folder"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "model.compile=true does not work on rank 0 (" in done.stderr
    none, psd, obdsd = json.loads((tmp_path / "bench.json").read_text())["rows"][:3]
    for row in (none, psd, obdsd):
        assert 0 < row[WAIT] < row["ms"]
        assert row["objective"] > 0
        assert row["compiled"] is False
    assert obdsd["teacher"] > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--shards", "nowhere"], "nowhere"),
        (["--batch", "7"], "--batch is 7; give an even number"),
        (["--backbone", "vgg"], "model.backbone"),
        (["--precision", "float16"], "precision"),
        (["--decode", "gpu", "--backbone", "resnet18"], "give packed ones by --shards"),
        (["--decode", "gpu", "--shards", "packed"], "small_cnn reads grey ones; give --backbone resnet50"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    if "packed" in arguments:
        runs.make_images(tmp_path / "images", 8)
        packed = runs.program("pack", "folder", "--source", "images", "--out", "packed", cwd=tmp_path)
        assert packed.returncode == 0, packed.stderr
    done = runs.program("bench", "step", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert sentence in done.stderr


def test_the_objective_alone_takes_the_step_s_road() -> None:
    case = {"backbone": "small_cnn", "image_size": 16, "batch": 8, "dim": 8, "precision": "float32", "compile": False,
            "teacher_precision": "same", "shards": None, "workers": 0}  # fmt: skip
    config, rank = step.config(case, "obdsd", 1), Runtime(Launch("test"), torch.device("cpu"))
    with step.Feed(config, rank) as feed:
        arm = step.Arm(config, rank, Split(rank.device), feed)
    handed, terms = [], arm.step.objective.terms
    arm.step.objective.terms = lambda view, T_BD, pending: handed.append(pending) or terms(view, T_BD, pending)
    for looks_later in (False, True):
        arm.step.looks_later = looks_later
        ((B, seconds),) = step._objective_alone(arm, 0.0)
        assert B == 64
        assert seconds > 0
    assert [pending is not None for pending in handed] == [False, False, True, True]


class Machine:
    def work(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds


def test_a_split_gives_every_call_to_its_part() -> None:
    split, machine, seen = Split(torch.device("cpu")), Machine(), []
    split.around(machine, "work", "busy", seen.append)
    split.mark("between")
    for _ in range(2):
        assert machine.work(0.02) == 0.02
    time.sleep(0.03)
    split.mark("other")
    parts = split.seconds()
    assert seen == [0.02, 0.02]
    assert 0.04 <= parts["busy"] < 0.06
    assert 0.03 <= parts["other"] < 0.05
    assert split.seconds() == {}


def test_a_projection_adds_up_what_was_measured_and_the_messages() -> None:
    b, dim, parameters = 100, 10, 1_000_000
    student = {"student forward": 10.0, "student backward": 20.0, "optimizer": 1.0, "other": 1.0}
    measured = {"parameters": parameters, "objective": [(800, 0.002), (6400, 0.128)]}
    rows = [{"W": 1, "B": b, "arm": "obdsd", "teacher": 9.0, **student, projection.MEASURED: measured}]
    options = argparse.Namespace(dim=dim, gigabytes=1.0, latency=10.0)
    eight, more, most = projection.rows(rows, options)
    volume = 3 * 4 * 700 * dim + 2 * 4 * parameters * 7 / 8
    sent = 1000 * (volume / 1e9 + 5 * 3 * 10e-6)
    assert eight["communication"] == pytest.approx(sent)
    assert eight["ms"] == pytest.approx(32 + 9 + 2 + sent)
    assert eight["images_per_s"] == pytest.approx(1000 * 800 / eight["ms"])
    assert more["objective"] == pytest.approx(128)
    assert "budget" in most["skipped"]
    # It grows with B squared, 2 ms at 800: 32 ms at 3,200.
    assert rows[0]["bottleneck_B"] == pytest.approx(3200)
    assert projection.MEASURED not in rows[0]
