import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks import common
from dist_obdsd.distributed.launch import Launch, Runtime
from tests import harness


def run_case(run_rank: Callable[..., Any], world: int, case: dict[str, Any], **shown: Any) -> list[dict[str, Any]]:
    answer = harness.run(world, _rank, run_rank, case | shown)[0]
    return [shown | row for row in (answer if isinstance(answer, list) else [answer])]


def _rank(run_rank: Callable[..., Any], case: dict[str, Any]) -> Any:
    rank, world = dist.get_rank(), dist.get_world_size()
    return run_rank(Runtime(Launch("test", rank, world, rank, world), torch.device("cpu")), case)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """``main`` of a benchmark on the ranks that the tests share; returns its rows."""

    def run(module: ModuleType, *arguments: object) -> list[dict[str, Any]]:
        assert module.main([*map(str, arguments), "--json", f"{tmp_path}/rows.json"]) == 0
        rows: list[dict[str, Any]] = json.loads((tmp_path / "rows.json").read_text())["rows"]
        return rows

    monkeypatch.setattr(common, "run_case", run_case)
    return run
