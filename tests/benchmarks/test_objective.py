"""The benchmarks of the objective, its gradients, the manifold, retrieval metrics, and a rank of many."""

import pytest
import torch

from benchmarks import gradients, manifold, objective, scale, search


def test_implementations_agree_and_are_timed(bench, capsys):
    rows = bench(objective, "--sizes", 24, "--dim", 16, "--worlds", "1,2", "--budget", 1)
    ours, loop, library, efficient = objective.OURS, objective.LOOP, objective.LIBRARY, objective.EFFICIENT
    assert [(row["W"], row["variant"], row["implementation"]) for row in rows] == [
        (1, "none", ours), (1, "none", loop), (1, "none", library), (1, "psd", ours), (1, "psd", loop),
        (1, "obdsd", ours), (1, "obdsd", loop), (2, "none", ours), (2, "none", library), (2, "none", efficient),
    ]  # fmt: skip
    for row in rows:
        assert row["seconds"] > 0
        assert (row["ratio"] == 1) == (row["implementation"] == ours)
    found = objective.findings(rows)
    assert len(found) == 6
    assert found["share of pytorch-metric-learning, none, B=24 on 2 ranks"] == 1 / rows[8]["ratio"]
    assert "share of loop and inverse, obdsd, B=24" in capsys.readouterr().out


def test_what_the_objective_is_compared_with_is_the_same_mathematics():
    E_BD, T_BD = (objective.embeddings(16, 8, seed, "cpu").double() for seed in (0, 1))
    for variant in objective.VARIANTS:
        ways = objective.implementations(variant, T_BD, torch.arange(16) // 2, slice(16))
        leaves = [E_BD.clone().requires_grad_() for _ in range(2)]
        ours, loop = (ways[name](leaf) for name, leaf in zip((objective.OURS, objective.LOOP), leaves, strict=True))
        assert ours.item() == pytest.approx(loop.item(), rel=1e-10)
        (ours + loop).backward()
        assert (leaves[0].grad - leaves[1].grad).abs().max() < 1e-10 * leaves[0].grad.abs().max()


def test_manifold_measures_a_rank_s_share_by_solver(bench):
    rows = bench(manifold, "--sizes", 64, "--worlds", "1,8")
    assert [(row["B"], row["W"], row["b"], row["solver"]) for row in rows] == [
        (64, 1, 64, "cg"), (64, 1, 64, "cholesky"), (64, 1, 64, "inverse"), (64, 8, 8, "cg"), (64, 8, 8, "cholesky"),
    ]  # fmt: skip
    for row in rows:
        assert row["error"] < 2e-4
        assert row["seconds"] > 0
        assert row["peak_mib"] > 100  # the libraries alone
        assert (row["iterations"] > 0) == (row["solver"] == "cg")


def test_our_gradients_are_exact_and_the_efficient_ones_not(bench):
    rows = bench(gradients, "--worlds", 2)
    ours = [row for row in rows if row["library"] == "dist-obdsd"]
    assert len(ours) == 4
    for row in ours:
        assert row["error"] < 1e-12
        assert row["factor"] == pytest.approx(1)
        assert row["loss ratio"] == pytest.approx(1)
    assert min(row["error"] for row in rows if "efficient" in row["loss"]) > 0.1


def test_retrieval_metrics_of_others_and_of_two_ranks_agree(bench, monkeypatch):
    monkeypatch.setattr(search, "SIZES", {"small": (600, 16, 20)})
    rows = bench(search, "--sizes", "small", "--rounds", 1)
    assert [(row["W"], row["implementation"]) for row in rows] == [
        (1, search.HERE), (1, "faiss and NumPy"), (1, "pytorch-metric-learning"), (2, search.HERE),
    ]  # fmt: skip
    for row in rows:
        assert row["cpu_seconds"] > 0
        for name in ("recall@1", "map@r"):
            assert row[name] == pytest.approx(rows[0][name], abs=1e-6)
    assert 0.01 < rows[0]["map@r"] < 0.95
    assert 100 < rows[3]["peak_mib_per_rank"] < 4000


@pytest.mark.parametrize(("W", "strategy"), [(4, "ddp"), (16, "ddp"), (4, "fsdp")])
def test_rank_0_of_many_sends_and_holds_what_formulas_say(bench, W, strategy):
    b, D = 4, 8
    settings = ("model.backbone=resnet18", f"model.embedding_dim={D}", f"strategy={strategy}")
    (row,) = bench(scale, *settings, "--worlds", W, "--batch", b)
    parameters = 11_176_512 + 512 * D + D
    kept = [row[part] * 2**30 / (4 * parameters) for part in ("weights", "gradients", "teacher", "optimizer")]
    shards = 1 if strategy == "ddp" else W
    assert kept == pytest.approx([1 / shards, 1 / shards, 1 / shards, 2 / shards], rel=0.01)
    assert sum(kept) < row["peak GiB"] * 2**30 / (4 * parameters) < 20
    if strategy == "ddp":
        # The student's and the teacher's embeddings are gathered, and the student's gradient is scattered back.
        sent = 3 * W * b * D * 4 * (W - 1) / W
        assert row["of embeddings"] * 2**20 == pytest.approx(sent, abs=2048)  # and one all-reduce of sums and flags
        gradient = 2 * 4 * parameters * (W - 1) / W
        assert (row["MiB sent"] - row["of embeddings"]) * 2**20 == pytest.approx(gradient, abs=2)
        assert row["messages"] == row["of gradients"] + 4
