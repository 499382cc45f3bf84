"""The same config and shards, through the command line, on 1, 2 and 4 ranks."""

import json

import pytest

from dist_obdsd import checkpoint
from tests import runs

LOSSES = {"ranking", "distillation", "target_entropy", "grad_norm", "anchors"}


def test_losses_weights_and_metrics_do_not_depend_on_the_ranks(folder):
    for ranks in (1, 2, 4):
        runs.train(folder, f"name=on{ranks}", "epochs=4", ranks=0 if ranks == 1 else ranks)
    runs.train(folder, "name=workers", "epochs=4", "data.workers=0")
    runs.train(folder, "name=control", "epochs=4", "seed=1")
    reference = runs.metrics(folder / "runs" / "on1", "step")
    assert len(reference) >= 20
    assert any("distillation" in row for row in reference[:20])
    for name in ("on2", "on4", "workers"):
        rows = runs.metrics(folder / "runs" / name, "step")
        assert len(rows) == len(reference)
        for row, expected in zip(rows, reference, strict=True):
            assert row.keys() == expected.keys()
            for loss in row.keys() & LOSSES:
                assert row[loss] == pytest.approx(expected[loss], rel=1e-9, abs=1e-9)
    other = runs.metrics(folder / "runs" / "control", "step")
    assert abs(other[0]["ranking"] - reference[0]["ranking"]) > 1e-6

    weights = {name: checkpoint.load(folder / "runs" / name)["student"] for name in ("on1", "on2", "on4", "control")}
    for key, value in weights["on1"].items():
        for name in ("on2", "on4"):
            assert (weights[name][key] - value).abs().max() < 1e-9
    assert (weights["control"]["head.weight"] - weights["on1"]["head.weight"]).abs().max() > 1e-3

    summaries = [json.loads((folder / "runs" / f"on{n}" / "summary.json").read_text()) for n in (1, 2, 4)]
    for summary in summaries[1:]:
        assert summary["rows"] == summaries[0]["rows"]
