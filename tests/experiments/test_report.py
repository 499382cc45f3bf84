"""The report of runs whose numbers are known: every file says the same, and no more than the runs bear."""

import csv
import io
from pathlib import Path
from typing import Any

from PIL import Image
from scipy import stats

from dist_obdsd.data import manifest as manifests
from dist_obdsd.experiments.report import Report, aligned
from dist_obdsd.experiments.run_status import RunStatus
from dist_obdsd.experiments.variants import plan, read_grid, read_variants

VALUES = {"none": [0.70, 0.72, 0.71], "psd": [0.72, 0.75, 0.72], "obdsd": [0.71, 0.70, 0.74]}


def report(folder: Path, values: dict[str, list[float]], grid: tuple[str, ...] = (), *overrides: str) -> Report:
    """Variant (and point) -> a Recall@1 per seed; a value that is missing is a run that failed."""
    variants = read_variants(",".join(dict.fromkeys(label.split()[0] for label in values)))
    specs = plan(folder / "tiny.yaml", overrides, variants, [0, 1, 2], read_grid(grid))
    runs = []
    for spec in specs:
        given = dict(enumerate(values[spec.label]))
        if spec.seed not in given:
            runs.append(RunStatus(spec, "failed", "the disk said no", {}, {}))
            continue
        value = given[spec.seed]
        meta: dict[str, Any] = {"validation_classes": 0, "best_validation": None}
        if spec.config.validation.holds_out:
            meta["best_validation"] = {"value": 1 - value, "epoch": 2}
        row = {"protocol": "last", "metric": "recall@1", "value": value, "epoch": 3}
        commit = "c0ffee" if spec.variant != "obdsd" else "deed"
        provenance = {"git_commit": commit, "version.torch": "2", "world_size": "2"}
        runs.append(RunStatus(spec, "finished", "", {"meta": meta, "rows": [row]}, provenance))
    where = specs[0].config.data.shards
    return Report("tiny", ["all", *"runs"], runs, "none", {where: manifests.load(where)})


def table_row(text: str, *starts: str) -> list[str]:
    """The cells of the one table row that begins with these."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    (found,) = [row for row in rows if row[: len(starts)] == list(starts)]
    return found


def test_statistics_are_scipys_and_stand_in_every_file(folder: Path) -> None:
    found = report(folder, VALUES)
    files = {path.name: path for path in found.write(folder / "out")}
    assert files.keys() == {"report.md", "report.png", "values.csv", "statistics.csv"}
    text = files["report.md"].read_text()
    for variant, values in VALUES.items():
        low, high = stats.t.interval(0.95, 2, loc=sum(values) / 3, scale=stats.sem(values))
        cells = table_row(text, "recall@1", variant)
        assert cells[2:6] == ["3", f"{sum(values) / 3:.4f}", f"{stats.tstd(values):.4f}", f"{low:.4f} to {high:.4f}"]
        test = stats.ttest_rel(values, VALUES["none"])
        between, mean = test.confidence_interval(0.95), sum(values) / 3 - sum(VALUES["none"]) / 3
        apart = [f"{mean:+.4f}", f"{between.low:+.4f} to {between.high:+.4f}", "3", f"{test.pvalue:.3f}"]
        assert cells[6:] == (["baseline", "", "", ""] if variant == "none" else apart)
    rows = list(csv.DictReader(io.StringIO(files["values.csv"].read_text())))
    assert {(row["variant"], int(row["seed"]), float(row["value"])) for row in rows} == {
        (variant, seed, value) for variant, values in VALUES.items() for seed, value in enumerate(values)
    }
    psd = next(row for row in found.meta()["statistics"] if row["variant"] == "psd")
    assert psd["difference_p"] == stats.ttest_rel(VALUES["psd"], VALUES["none"]).pvalue
    assert found.means()["psd/last/recall@1/mean"] == psd["mean"]
    with Image.open(files["report.png"]) as image:
        assert image.width > 600


def test_conditions_name_what_differs(folder: Path) -> None:
    found = report(folder, VALUES)
    conditions = found.meta()["run_metadata"]
    assert conditions["git commit"] == "none, psd: c0ffee; obdsd: deed"
    assert conditions["ranks"] == "2"
    assert conditions["dataset"] == "folder: train 96 images of 12 classes, test 96 images of 12 classes"
    assert conditions["pretraining data"] == "none (random initialization)"
    assert conditions["model selection"].startswith("none: no classes are held out")
    text = found.markdown()
    assert all(f"| {name} " in text for name in ("model.backbone", "epochs", "manifest", "seeds", "hardware"))
    assert "2 tests, uncorrected" in text


def test_missing_runs_are_named_and_their_variants_say_less(folder: Path) -> None:
    text = report(folder, VALUES | {"psd": [0.72, 0.75]}).markdown()
    assert "8 of 9 runs are finished" in text
    assert "- `tiny-psd-seed2` failed: the disk said no" in text
    cells = table_row(text, "recall@1", "psd")
    assert (cells[2], cells[5], cells[7], cells[8], cells[9]) == ("2", "-", "-", "2", "-")
    assert "fewer than 3 finished seeds" in text


def test_a_grid_point_is_chosen_by_validation_classes_alone(folder: Path) -> None:
    # The test set and the validation classes, which are 1 minus it here, want different points.
    values = {
        f"{variant} epochs={epochs}": [value] * 3
        for variant, epochs, value in (("none", 3, 0.5), ("none", 4, 0.7), ("psd", 3, 0.9), ("psd", 4, 0.8))
    }
    text = report(folder, values, ("epochs=3,4",), "validation.fraction=0.25").markdown()
    chosen = text.split("## Choice of the grid's point")[1]
    assert table_row(chosen.split("##")[0], "none")[1] == "`epochs=3`"
    assert table_row(chosen.split("##")[0], "psd")[1] == "`epochs=4`"
    # Every variant is compared with the baseline at its own point.
    last = text.split("### last")[1].split("###")[0]
    assert table_row(last, "recall@1", "psd epochs=4")[6] == "+0.1000"
    text = report(folder, values, ("epochs=3,4",)).markdown()
    assert "nothing here may choose between the points" in text


def test_a_table_reads_as_it_stands() -> None:
    assert aligned(["name", "x", "n"], [["none", "a", "3"], ["x", "b", "1"]]).splitlines() == [
        "| name | x  |  n |", "| ---- | -- | -: |", "| none | a  |  3 |", "| x    | b  |  1 |"
    ]  # fmt: skip
