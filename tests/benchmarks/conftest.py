import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import common
from dist_obdsd.distributed.launch import Launch, Runtime
from tests import harness


def _case(run_rank: Callable[..., Any], case: dict[str, Any]) -> list[dict[str, Any]]:
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    answer = run_rank(Runtime(Launch("test", rank, world, rank, world), torch.device("cpu")), case)
    return answer if isinstance(answer, list) else [answer]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """``main`` of a benchmark on the ranks that the tests share; returns its rows."""

    def run(module: ModuleType, *arguments: object) -> list[dict[str, Any]]:
        assert module.main([*map(str, arguments), "--json", f"{tmp_path}/rows.json"]) == 0
        rows: list[dict[str, Any]] = json.loads((tmp_path / "rows.json").read_text())["rows"]
        return rows

    monkeypatch.setattr(common, "run_case", lambda call, world, case: harness.run(world, _case, call, case)[0])
    return run
