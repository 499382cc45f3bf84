"""The report of runs whose numbers are known: every file says the same, and no more than the runs bear."""

import csv
import io
import math

import pytest
from scipy import stats

from dist_obdsd.data import manifest as manifests
from dist_obdsd.experiments.report import Report
from dist_obdsd.experiments.run_status import RunStatus
from dist_obdsd.experiments.statistics import difference, spread
from dist_obdsd.experiments.variants import plan, read_grid, read_variants

VALUES = {"none": [0.70, 0.72, 0.71], "psd": [0.72, 0.75, 0.72], "obdsd": [0.71, 0.70, 0.74]}


def report(folder, values, grid=(), *overrides):
    """Variant (and point) -> a Recall@1 per seed; a value that is missing is a run that failed."""
    variants = read_variants(",".join(dict.fromkeys(label.split()[0] for label in values)))
    specs = plan(folder / "tiny.yaml", overrides, variants, [0, 1, 2], read_grid(grid))
    runs = []
    for spec in specs:
        if spec.seed == len(values[spec.label]):
            runs.append(RunStatus(spec, "failed", "the disk said no", {}, {}))
            continue
        value = values[spec.label][spec.seed]
        best = {"value": 1 - value, "epoch": 2} if spec.config.validation.holds_out else None
        meta = {"validation_classes": 0, "best_validation": best}
        row = {"protocol": "last", "metric": "recall@1", "value": value, "epoch": 3}
        commit = "c0ffee" if spec.variant != "obdsd" else "deed"
        provenance = {"git_commit": commit, "version.torch": "2", "world_size": "2"}
        runs.append(RunStatus(spec, "finished", "", {"meta": meta, "rows": [row]}, provenance))
    where = specs[0].config.data.shards
    return Report("tiny", ["all", *"runs"], runs, "none", {where: manifests.load(where)})


def table_row(text, *starts):
    """The cells of the one table row that begins with these."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    (found,) = [row for row in rows if row[: len(starts)] == list(starts)]
    return found


def test_statistics_are_scipys_and_stand_in_every_file(folder):
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


def test_conditions_name_what_differs(folder):
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


def test_missing_runs_are_named_and_their_variants_say_less(folder):
    text = report(folder, VALUES | {"psd": [0.72, 0.75]}).markdown()
    assert "8 of 9 runs are finished" in text
    assert "- `tiny-psd-seed2` failed: the disk said no" in text
    cells = table_row(text, "recall@1", "psd")
    assert (cells[2], cells[5], cells[7], cells[8], cells[9]) == ("2", "-", "-", "2", "-")
    assert "fewer than 3 finished seeds" in text


def test_a_grid_point_is_chosen_by_validation_classes_alone(folder):
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
    assert "nothing here may choose between the points" in report(folder, values, ("epochs=3,4",)).markdown()


T2 = 4.302652729911275  # Student's t, 97.5 %, 2 degrees of freedom, from the printed tables (4.303)


@pytest.mark.parametrize(
    ("values", "mean", "std", "half"),
    [
        ([0.5], 0.5, None, None),
        ([0.5, 0.7], 0.6, math.sqrt(0.02), None),
        # Deviations -0.02, -0.01, 0.03; their squares sum to 0.0014.
        ([0.80, 0.81, 0.85], 0.82, math.sqrt(0.0014 / 2), T2 * math.sqrt(0.0007 / 3)),
    ],
)
def test_mean_deviation_and_interval_by_hand(values, mean, std, half):
    of = spread(values)
    assert (of.n, of.p) == (len(values), None)
    assert (of.mean, of.std, of.half) == tuple(x if x is None else pytest.approx(x) for x in (mean, std, half))


def test_a_paired_test_by_hand():
    variant, baseline = {0: 0.82, 1: 0.71, 2: 0.94}, {0: 0.80, 1: 0.70, 2: 0.91}
    found = difference(variant, baseline)  # differences 0.02, 0.01, 0.03: mean 0.02, deviation 0.01
    assert (found.n, found.mean, found.std) == (3, pytest.approx(0.02), pytest.approx(0.01))
    assert found.half == pytest.approx(T2 * 0.01 / math.sqrt(3))
    t = 0.02 / (0.01 / math.sqrt(3))
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t * t))  # Student's distribution of 2 degrees, in closed form
    assert difference(variant | {5: 9.0}, baseline | {7: 0.0}) == found  # seeds of one side alone do not count
    assert found.p < 0.1  # not what an unpaired test would say of variants that lie this far apart
    assert difference({0: 1.0}, {1: 1.0}) is None
    assert difference({0: 0.5, 1: 0.7}, {0: 0.4, 1: 0.5}).p is None


def test_equal_differences_have_no_p_value():
    baseline = {0: 0.1, 1: 0.2, 2: 0.3}
    assert difference(baseline, baseline).p is None
    shifted = {seed: value + 0.1 for seed, value in baseline.items()}  # equal but for rounding
    assert difference(shifted, baseline).p is None
    assert difference(shifted, baseline).mean == pytest.approx(0.1)
