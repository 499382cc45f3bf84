"""The same config and shards, through the command line, on 1, 2 and 4 ranks."""

import json

import pytest

from dist_obdsd import checkpoint
from tests import runs

LOSSES = {"ranking", "distillation", "target_entropy", "grad_norm", "anchors"}


def test_losses_weights_and_metrics_do_not_depend_on_the_ranks(train, folder, untouched):
    alone = untouched("epochs=2")
    others = [untouched("epochs=2", ranks=ranks) for ranks in (2, 4)]
    assert train("name=workers", "epochs=2")[0] == 0  # without any
    reference = runs.metrics(alone, "step")
    assert len(reference) == 12
    assert any("distillation" in row for row in reference)
    for run in (*others, folder / "runs" / "workers"):
        for row, expected in zip(runs.metrics(run, "step"), reference, strict=True):
            assert row.keys() == expected.keys()
            for loss in row.keys() & LOSSES:
                assert row[loss] == pytest.approx(expected[loss], rel=1e-9, abs=1e-9)
    weights = checkpoint.load(alone)["student"]
    rows = json.loads((alone / "summary.json").read_text())["rows"]
    for run in others:
        theirs = checkpoint.load(run)["student"]
        assert all((theirs[name] - value).abs().max() < 1e-9 for name, value in weights.items())
        assert json.loads((run / "summary.json").read_text())["rows"] == rows
    # The control: another seed begins and ends elsewhere.
    assert train("name=control", "epochs=2", "seed=1")[0] == 0
    control = folder / "runs" / "control"
    assert abs(runs.metrics(control, "step")[0]["ranking"] - reference[0]["ranking"]) > 1e-6
    assert (checkpoint.load(control)["student"]["head.weight"] - weights["head.weight"]).abs().max() > 1e-3
