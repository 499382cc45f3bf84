"""Another library's loss over several ranks beside ours, on the ranks that the tests share."""

import argparse
from typing import Any

import pytest
import torch

from benchmarks import objective
from dist_obdsd.distributed.launch import Launch, Runtime
from tests import harness


def measure(module: str, world: int, case: dict[str, Any], has_library: bool = True) -> Any:
    """``run_case`` without starting any."""
    return harness.run(world, _measure, case, has_library)[0]


def _measure(case: dict[str, Any], has_library: bool) -> Any:
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    runtime = Runtime(Launch("test", rank, world, rank, world), torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patched:
        if not has_library:
            patched.setattr(objective, "has_library", lambda: False)
        return objective.run_rank(runtime, case)


@pytest.fixture
def options() -> argparse.Namespace:
    return argparse.Namespace(dim=16, threads=1, budget=1.0)


@pytest.mark.parametrize("world", [2, 3])
def test_both_give_one_process_s_gradient_and_the_quick_way_does_not(
    world: int, options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective, "run_case", measure)
    rows = objective.measure_ranks((24,), world, options)
    assert [(row["W"], row["B"], row["variant"]) for row in rows] == [(world, 24, "none")] * 3
    ours, theirs, efficient = rows
    assert (ours["implementation"], ours["ratio"]) == ("dist-obdsd", 1)
    for row in (ours, theirs):
        assert row["error"] < 1e-5
        assert row["cosine"] > 1 - 1e-5
    assert efficient["error"] > 0.1
    assert efficient["cosine"] < 1 - 1e-3
    for row in rows:
        assert row["ratio"] == pytest.approx(row["seconds"] / ours["seconds"])
        assert row["seconds"] > 0
    found = objective.findings(rows)
    assert found[f"share of pytorch-metric-learning, none, B=24 on {world} ranks"] == 1 / theirs["ratio"]


def test_ours_alone_where_the_library_is_missing(options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "run_case", lambda *args: measure(*args, has_library=False))
    (row,) = objective.measure_ranks((8,), 2, options)
    assert row["implementation"] == "dist-obdsd"
    monkeypatch.setattr(objective, "run_case", lambda *args: {"skipped": "took more than 1 s"})
    assert objective.measure_ranks((8,), 2, options) == [
        {"W": 2, "B": 8, "variant": "none", "skipped": "took more than 1 s"}
    ]
    assert objective.findings(objective.measure_ranks((8,), 2, options)) == {}


def test_a_batch_that_ranks_cannot_share_is_refused_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert objective.main(["--sizes", "16", "--worlds", "3", "--budget", "1"]) == 2
    assert "--sizes has 16, which 3 ranks cannot share equally; give multiples of 3" in capsys.readouterr().err
