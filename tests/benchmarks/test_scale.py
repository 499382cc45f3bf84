from argparse import Namespace

import pytest

from benchmarks.scale import measure


@pytest.mark.parametrize("W", [4, 16])
def test_rank_0_of_many_sends_what_the_formulas_say(W):
    b, D = 4, 8
    row = measure("resnet18", W, Namespace(batch=b, dim=D, memory_gib=1.0))
    # The student's and the teacher's embeddings are gathered, and the student's gradient is scattered back.
    rows = 3 * W * b * D * 4 * (W - 1) / W
    assert row["of embeddings"] * 2**20 == pytest.approx(rows, abs=2048)  # and one all-reduce of sums and flags
    parameters = 11_176_512 + 512 * D + D
    gradient = 2 * 4 * parameters * (W - 1) / W
    assert (row["MiB sent"] - row["of embeddings"]) * 2**20 == pytest.approx(gradient, abs=2)
    assert row["messages"] == row["of gradients"] + 4
    # Student, teacher, gradient and Adam's two moments at least.
    assert 5 * 4 * parameters < row["peak GiB"] * 2**30 < 20 * 4 * parameters
