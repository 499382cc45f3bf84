"""Evaluations during a run, and the epochs that it reports as its best."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dist_obdsd.training.model_selection import ModelSelector
from tests import runs

METRICS = "evaluation.metrics=[recall, map@r, nmi, rho_spectrum]"


def protocols(run: Path) -> dict[str, dict[str, Any]]:
    """Protocol -> {metric: value, "epoch": n, "note": text}."""
    found: dict[str, dict[str, Any]] = {}
    for row in json.loads((run / "summary.json").read_text())["rows"]:
        found.setdefault(row["protocol"], {"epoch": row["epoch"], "note": row.get("note")})[row["metric"]] = row[
            "value"
        ]
    return found


def test_the_best_epochs_are_those_of_the_metrics(train, untouched):
    more = (METRICS, "validation.fraction=0.5", "validation.max_images=40", "evaluation.best_test=true", "epochs=4",
            "evaluation.select_by=recall@1")  # fmt: skip
    code, said, _ = train(*more)
    assert code == 0
    run = Path("runs/tiny")
    # It is stopped at an epoch's end, whose lines stay, then inside an epoch: what it measures there is of no epoch.
    for limit in (["max_steps=6"], ["max_steps=8"], []):
        assert train("name=resumed", *more, *limit)[0] == 0
    for kind in ("validation", "test"):
        assert runs.metrics(Path("runs/resumed"), kind) == runs.metrics(run, kind)
    found = protocols(run)
    assert found.keys() == {"last", "best_validation", "best_test"}
    assert protocols(Path("runs/resumed")) == protocols(untouched(*more, ranks=2)) == found

    validated, tested = ({row["epoch"]: row for row in runs.metrics(run, kind)} for kind in ("validation", "test"))
    assert validated.keys() == tested.keys() == {1, 2, 3, 4}
    names = {"recall@1", "recall@2", "map@r", "nmi", "rho_spectrum"}
    best, other = (max(validated, key=lambda e: validated[e][by]) for by in ("recall@1", "map@r"))  # first of equals
    assert best != other  # so the metric that was asked for has chosen
    meta = json.loads((run / "summary.json").read_text())["meta"]
    assert meta["best_validation"]["value"] == validated[best]["recall@1"]
    for protocol, epoch in (
        ("last", 4),
        ("best_validation", best),
        ("best_test", max(tested, key=lambda e: tested[e]["recall@1"])),
    ):
        assert found[protocol]["epoch"] == epoch
        assert {name: tested[epoch][name] for name in names} == {name: found[protocol][name] for name in names}
    assert found["best_test"]["note"].startswith("as in the papers")
    assert found["last"]["note"] is None
    assert "best_test: as in the papers" in said
    # Six classes of 8 are held out, and five of them fit into 40 images.
    assert meta["validation_classes"] == 5
    assert "(40 queries" in said


def test_a_run_that_ends_inside_an_epoch_loads_the_best(train, folder):
    more = ("validation.fraction=0.25", "distillation.target=none")
    assert train("name=one", *more, "epochs=1")[0] == 0
    steps = len(runs.metrics(folder / "runs" / "one", "step"))
    assert train("name=inside", *more, "epochs=3", f"max_steps={steps + 2}")[0] == 0
    found = protocols(folder / "runs" / "inside")
    assert found["best_validation"]["epoch"] == found["last"]["epoch"] == 1
    whole = protocols(folder / "runs" / "one")["last"]
    assert found["best_validation"] == whole
    assert found["last"] != whole


@pytest.mark.parametrize(
    ("recall", "map_at_r", "fact"),
    [
        (0.7, 0.5, None),
        (0.6, 0.5, "lowered recall@1 from 0.7000 to 0.6000, though it raised map@r from 0.4000 to 0.5000; lower"),
        (0.6, 0.3, "lowered map@r from 0.4000 to 0.3000 and recall@1 from 0.7000 to 0.6000; lower optim.lr (3)"),
    ],
)
def test_a_fall_of_either_metric_is_told(recall, map_at_r, fact):
    settings = SimpleNamespace(optim=SimpleNamespace(lr=3.0))
    selector = SimpleNamespace(untrained={"recall@1": 0.7, "map@r": 0.4}, config=settings, select_by="map@r")
    note = ModelSelector._made_worse(selector, {"recall@1": recall, "map@r": map_at_r})
    assert note is None if fact is None else fact in note


def test_recall_alone_may_be_measured(train):
    assert train("evaluation.metrics=[recall]", "max_steps=1")[0] == 0


def test_a_run_goes_on_from_another_until_it_gets_worse(train, folder):
    """Untrained it is the other run's network; a rate far too large spoils it, and patience ends that."""
    begun = train("name=first", "epochs=2", "validation.fraction=0.25", "evaluation.untrained=true")
    assert begun[0] == 0
    assert "made it worse" not in begun[1]  # the control
    more = ("model.pretrained=runs/first", "validation.fraction=0.25", "validation.patience=2", "epochs=9",
            "name=second", "optim.lr=3", "distillation.temperature=30")  # fmt: skip
    code, said, _ = train(*more)
    assert code == 0
    found, first = protocols(folder / "runs" / "second"), protocols(folder / "runs" / "first")["last"]
    numbers = found["last"].keys() - {"epoch", "note"}
    assert {name: found["untrained"][name] for name in numbers} == {name: first[name] for name in numbers}
    assert found["last"]["map@r"] < found["untrained"]["map@r"]
    assert "made it worse" in found["last"]["note"]
    assert "lower optim.lr (3)" in said
    validated = runs.metrics(folder / "runs" / "second", "validation")
    best = max(validated, key=lambda row: row["map@r"])["epoch"]
    assert len(validated) == found["last"]["epoch"] == best + 2 < 9
    assert "2 validations in a row found no better one" in said
    assert "nats from uniform" in said  # at this temperature the targets are flat
    assert "finished already" in train(*more)[1]
