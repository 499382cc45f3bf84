"""The benchmark of search on sizes that take a second: real ranks, true figures, and a budget that is kept."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import search


def test_rows_are_measured_on_real_ranks(tmp_path: Path) -> None:
    path = tmp_path / "search.json"
    assert search.main(["--sizes", "600", "--worlds", "2", "--dim", "16", "--budget", "20", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["ranks"], row["backend"]) for row in rows] == [(2, "torch"), (2, "faiss")]
    for row in rows:
        assert (row["n"], row["dim"], row["queries"]) == (600, 16, 600)
        assert row["ms_per_query"] == pytest.approx(1000 * row["seconds"] / 600)
        assert 0 < row["share"] < 1
        assert row["share"] == pytest.approx(2 * 600 * 600 * 16 / row["seconds"] / (1e9 * row["peak_gflops"]))
        assert 100 < row["peak_mib_per_rank"] < 4000


def test_a_small_budget_asks_fewer_queries_of_the_whole_gallery(tmp_path: Path) -> None:
    path = tmp_path / "search.json"
    assert search.main(["--sizes", "30000", "--worlds", "1", "--budget", "0.2", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["ranks"], row["backend"]) for row in rows] == [(1, "torch"), (1, "faiss")]
    for row in rows:
        assert row["queries"] in (100, 1000, 10000)


def test_images_do_not_depend_on_the_ranks() -> None:
    n, everything = 25_000, torch.arange(25_000)
    alone = search._embeddings(everything, n, 8)
    for world in (2, 3):
        for rank in range(world):
            assert torch.equal(search._embeddings(everything[rank::world], n, 8), alone[rank::world])
    assert alone.unique(dim=0).shape[0] == n
