"""The comparison of gradients across ranks, with the libraries that are installed."""

import pytest

from benchmarks import gradients


def test_ours_are_exact_and_the_efficient_wrapper_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    rows = gradients.measure(gradients.common.parser("").parse_args(["--budget", "30"], namespace=Worlds()))
    ours = [row for row in rows if row["library"] == "dist-obdsd"]
    assert len(ours) == 4
    for row in ours:
        assert row["error"] < 1e-12
        assert row["factor"] == pytest.approx(1)
        assert row["loss ratio"] == pytest.approx(1)
    assert min(row["error"] for row in rows if "efficient" in row["loss"]) > 0.1


class Worlds:
    worlds = (2,)
