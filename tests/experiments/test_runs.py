"""A whole comparison through the command line, with real runs: half-done, failing, resumed, refused."""

import json
import shlex

import pytest

from tests import runs

COMPARE = ("compare", "tiny.yaml", "--variants", "none,psd", "--seeds", "1")
SETTINGS = ("max_steps=7", "epochs=2", "data.workers=0", "validation.fraction=0.25")


@pytest.fixture(scope="module")
def study(tmp_path_factory, shards):
    folder = tmp_path_factory.mktemp("study")
    (folder / "tiny.yaml").write_text(runs.CONFIG.replace("SHARDS", str(shards)))
    return folder


@pytest.fixture
def compare(study, cli, monkeypatch):
    """``dist-obdsd compare`` in this process; the runs that it starts have processes of their own."""
    for name, value in runs.environment().items():
        monkeypatch.setenv(name, value)
    return lambda *more, exits=0: cli(*COMPARE, *SETTINGS, *more, cwd=study, exits=exits)


def test_from_a_job_list_over_a_failure_to_the_report(study, cli, compare):
    jobs = compare("--jobs", "slurm").stdout.splitlines()
    assert len(jobs) == 2
    # One job alone, as an array's task runs it, that ends early: half-done.
    program, *arguments = shlex.split(jobs[0])
    assert program == "dist-obdsd"
    cli(*arguments, "max_steps=3", cwd=study)
    none, psd = (study / "runs" / f"tiny-{variant}-seed0" for variant in ("none", "psd"))
    psd.write_text("in the way")
    done = compare(exits=1)
    assert "1 of 2 runs are not finished (runs/tiny-psd-seed0 failed)" in done.stderr
    assert "resuming runs/tiny-none-seed0" in done.stdout
    assert "runs/tiny-psd-seed0: failed after" in done.stdout
    report = study / "runs" / "tiny-comparison" / "report.md"
    assert "1 of 2 runs are finished" in report.read_text()
    assert "`tiny-psd-seed0` failed: it ended with exit code 2" in report.read_text()
    assert runs.status(none)["state"] == "finished"
    assert len(runs.metrics(none, "step")) == 7

    psd.unlink()
    before = (none / "metrics.jsonl").stat().st_mtime_ns
    out = compare("--json", "numbers.json").stdout
    assert out.count(": finished\n") == out.count(": finished after") == 1
    assert (none / "metrics.jsonl").stat().st_mtime_ns == before  # not trained again
    rows = json.loads((study / "numbers.json").read_text())["rows"]
    for variant, run in (("none", none), ("psd", psd)):
        summary = runs.summary(run)
        own = [row for row in rows if (row["variant"], row["seed"]) == (variant, 0)]
        mine = {(row["protocol"], row["metric"]): row["value"] for row in own}
        assert mine.pop(("validation", "map@r")) == summary["meta"]["best_validation"]["value"]
        assert mine == {(r["protocol"], r["metric"]): r["value"] for r in summary["rows"]}
    assert "2 of 2 runs are finished" in report.read_text()


@pytest.fixture
def finished(study, compare):
    """``compare`` where all runs are finished: by the test above, or now if it did not run."""
    if not (study / "runs" / "tiny-psd-seed0" / "status.json").exists():
        compare()
    return compare


def test_runs_with_other_settings_are_refused(finished):
    err = finished("optim.lr=0.01", "max_steps=3", exits=2).stderr
    assert "runs/tiny-none-seed0 was trained with other settings than the variant none with seed 0 (" in err
    assert "(optim.lr: 0.001 -> 0.01; max_steps: 7 -> 3)" in err


def test_states_are_listed_and_reported_without_training(study, finished):
    out = finished("--seeds", "2", "--dry-run").stdout
    assert [line.split("  ")[0] for line in out.splitlines()] == ["finished", "not started"] * 2
    done = finished("--seeds", "2", "--report-only", "--out", "elsewhere", exits=1)
    assert "2 of 4 runs are not finished" in done.stderr
    report = (study / "elsewhere" / "report.md").read_text()
    assert "2 of 4 runs are finished" in report
    assert "--report-only" not in report  # the command to reproduce it trains
    assert not (study / "runs" / "tiny-psd-seed1").exists()


def test_a_launcher_around_it_is_refused(compare, monkeypatch):
    for name, value in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"), "020x1", strict=True):
        monkeypatch.setenv(name, value)
    compare(exits=2)
