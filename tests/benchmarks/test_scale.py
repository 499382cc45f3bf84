import pytest

from benchmarks import scale


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
