"""The benchmark of retrieval metrics on sizes that take a second: real ranks, and implementations that agree."""

import pytest
import torch

from benchmarks import search


def test_implementations_and_ranks_are_measured_and_agree(bench, monkeypatch):
    monkeypatch.setattr(search, "SIZES", {"small": (600, 16, 20)})
    rows = bench(search, "--sizes", "small", "--rounds", 1)
    assert [(row["ranks"], row["implementation"]) for row in rows] == [
        (1, search.HERE), (1, "faiss and NumPy"), (1, "pytorch-metric-learning"), (2, search.HERE),
    ]  # fmt: skip
    for row in rows:
        assert row["cpu_seconds"] > 0
        for name in ("recall@1", "map@r"):
            assert row[name] == pytest.approx(rows[0][name], abs=1e-6)
    assert 0.01 < rows[0]["map@r"] < 0.95
    assert 100 < rows[3]["peak_mib_per_rank"] < 4000
    assert search.findings(rows)["small: two ranks to one"] == rows[3]["cpu_seconds"] / rows[0]["cpu_seconds"]


def test_images_do_not_depend_on_the_ranks():
    size = (2500, 8, 3)
    everything = torch.arange(size[0])
    alone, labels = search.embeddings(everything, size)
    for world in (2, 3):
        for rank in range(world):
            rows, of = search.embeddings(everything[rank::world], size)
            assert torch.equal(rows, alone[rank::world])
            assert torch.equal(of, labels[rank::world])
    assert alone.unique(dim=0).shape[0] == size[0]
