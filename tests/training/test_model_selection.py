"""Evaluations during a run, and the epochs that it reports as its best."""

from types import SimpleNamespace

from dist_obdsd.training.model_selection import ModelSelector
from tests import runs


def protocols(run):
    """Protocol -> {metric: value, "epoch": n, "note": text}."""
    found = {}
    for row in runs.summary(run)["rows"]:
        protocol = found.setdefault(row["protocol"], {"epoch": row["epoch"], "note": row.get("note")})
        protocol[row["metric"]] = row["value"]
    return found


def test_the_best_epochs_are_those_of_the_metrics(train, run, untouched):
    more = (
        "evaluation.metrics=[recall, map@r, nmi, rho_spectrum]", "evaluation.select_by=recall@1", "epochs=4",
        "evaluation.best_test=true", "validation.fraction=0.5", "validation.max_images=40",
    )  # fmt: skip
    said, resumed = train(*more).stdout, run.with_name("resumed")
    # It is stopped at an epoch's end, whose lines stay, then inside an epoch: what it measures there is of no epoch.
    for limit in (["max_steps=6"], ["max_steps=8"], []):
        train("name=resumed", *more, *limit)
    for kind in ("validation", "test"):
        assert runs.metrics(resumed, kind) == runs.metrics(run, kind)
    found = protocols(run)
    assert found.keys() == {"last", "best_validation", "best_test"}
    assert protocols(resumed) == protocols(untouched(*more, ranks=2)) == found

    validated, tested = ({row["epoch"]: row for row in runs.metrics(run, kind)} for kind in ("validation", "test"))
    assert validated.keys() == tested.keys() == {1, 2, 3, 4}
    names = {"recall@1", "recall@2", "map@r", "nmi", "rho_spectrum"}
    best, other = (max(validated, key=lambda e: validated[e][by]) for by in ("recall@1", "map@r"))  # first of equals
    assert best != other  # so the metric that was asked for has chosen
    meta = runs.summary(run)["meta"]
    assert meta["best_validation"]["value"] == validated[best]["recall@1"]
    best_test = max(tested, key=lambda e: tested[e]["recall@1"])
    for protocol, epoch in (("last", 4), ("best_validation", best), ("best_test", best_test)):
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
    train("name=one", *more, "epochs=1")
    steps = len(runs.metrics(folder / "runs" / "one", "step"))
    train("name=inside", *more, "epochs=3", f"max_steps={steps + 2}")
    found = protocols(folder / "runs" / "inside")
    assert found["best_validation"]["epoch"] == found["last"]["epoch"] == 1
    whole = protocols(folder / "runs" / "one")["last"]
    assert found["best_validation"] == whole
    assert found["last"] != whole


def test_a_fall_of_either_metric_is_told():
    settings = SimpleNamespace(optim=SimpleNamespace(lr=3.0))
    selector = SimpleNamespace(untrained={"recall@1": 0.7, "map@r": 0.4}, config=settings, select_by="map@r")
    one = ModelSelector._made_worse(selector, {"recall@1": 0.6, "map@r": 0.5})
    assert "lowered recall@1 from 0.7000 to 0.6000, though it raised map@r from 0.4000 to 0.5000; lower" in one
    both = ModelSelector._made_worse(selector, {"recall@1": 0.6, "map@r": 0.3})
    assert "lowered map@r from 0.4000 to 0.3000 and recall@1 from 0.7000 to 0.6000; lower optim.lr (3)" in both
    assert ModelSelector._made_worse(selector, {"recall@1": 0.7, "map@r": 0.5}) is None
    assert "though" not in ModelSelector._made_worse(selector, {"recall@1": 0.7, "map@r": 0.3})


def test_a_run_goes_on_from_another_until_it_gets_worse(train, folder):
    """Untrained it is the other run's network; a rate far too large spoils it, and patience ends that."""
    begun = train("name=first", "epochs=2", "validation.fraction=0.25", "evaluation.untrained=true")
    assert "made it worse" not in begun.stdout  # the control
    more = ("model.pretrained=runs/first", "validation.fraction=0.25", "validation.patience=2", "epochs=9",
            "name=second", "optim.lr=3", "distillation.temperature=30")  # fmt: skip
    said = train(*more).stdout
    found, first = protocols(folder / "runs" / "second"), protocols(folder / "runs" / "first")["last"]
    before, after = found["untrained"], found["last"]
    assert before == first | {"epoch": 0}
    assert f"it lowered map@r from {before['map@r']:.4f} to {after['map@r']:.4f}" in after["note"]
    validated = runs.metrics(folder / "runs" / "second", "validation")
    best = max(validated, key=lambda row: row["map@r"])["epoch"]
    assert len(validated) == after["epoch"] == best + 2 < 9
    assert "2 validations in a row found no better one" in said
    assert "nats from uniform" in said  # at this temperature the targets are flat
    assert "finished already" in train(*more).stdout
