"""A whole comparison through the command line, with real runs: half-done, failing, resumed, refused."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from dist_obdsd.cli import main as cli
from tests import runs

VARIANTS = ("--variants", "none,psd", "--seeds", "1")
SETTINGS = ("max_steps=7", "epochs=2", "data.workers=0", "validation.fraction=0.25")
Answer = tuple[int, str, str]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    folder = tmp_path_factory.mktemp("study")
    (folder / "tiny.yaml").write_text(runs.CONFIG.replace("SHARDS", str(shards)))
    return folder


@pytest.fixture
def compare(study: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """``dist-obdsd compare`` in this process; the runs that it starts have processes of their own."""
    monkeypatch.chdir(study)
    for name, value in runs.environment().items():
        monkeypatch.setenv(name, value)

    def run(*arguments: str) -> Answer:
        code = cli.main(["compare", "tiny.yaml", *VARIANTS, *SETTINGS, *arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return run


def state(run: Path) -> Any:
    return runs.status(run).get("state")


def test_from_a_job_list_over_a_failure_to_the_report(study: Path, compare: Callable[..., Answer]) -> None:
    code, out, _ = compare("--jobs", "slurm")
    jobs = out.splitlines()
    assert code == 0
    assert len(jobs) == 2
    # One job alone, as an array's task runs it, that ends early: half-done.
    program, *arguments = shlex.split(jobs[0])
    assert program == "dist-obdsd"
    assert cli.main([*arguments, "max_steps=3"]) == 0
    psd = study / "runs" / "tiny-psd-seed0"
    psd.write_text("in the way")
    code, out, err = compare()
    assert code == 1
    assert "1 of 2 runs are not finished (runs/tiny-psd-seed0 failed)" in err
    assert "resuming runs/tiny-none-seed0" in out
    assert "runs/tiny-psd-seed0: failed after" in out
    report = (study / "runs" / "tiny-comparison" / "report.md").read_text()
    assert "1 of 2 runs are finished" in report
    assert "`tiny-psd-seed0` failed: it ended with exit code 2" in report
    assert state(study / "runs" / "tiny-none-seed0") == "finished"
    assert len(runs.metrics(study / "runs" / "tiny-none-seed0", "step")) == 7

    psd.unlink()
    before = (study / "runs" / "tiny-none-seed0" / "metrics.jsonl").stat().st_mtime_ns
    code, out, _ = compare("--json", "numbers.json")
    assert code == 0
    assert out.count(": finished\n") == out.count(": finished after") == 1
    assert (study / "runs" / "tiny-none-seed0" / "metrics.jsonl").stat().st_mtime_ns == before  # not trained again
    rows = json.loads((study / "numbers.json").read_text())["rows"]
    for variant in ("none", "psd"):
        summary = json.loads((study / "runs" / f"tiny-{variant}-seed0" / "summary.json").read_text())
        own = [row for row in rows if (row["variant"], row["seed"]) == (variant, 0)]
        mine = {(row["protocol"], row["metric"]): row["value"] for row in own}
        best = mine.pop(("validation", "map@r"))
        assert best == summary["meta"]["best_validation"]["value"]
        assert mine == {(r["protocol"], r["metric"]): r["value"] for r in summary["rows"]}
    report = (study / "runs" / "tiny-comparison" / "report.md").read_text()
    assert "2 of 2 runs are finished" in report
    assert "fewer than 3 finished seeds" in out


@pytest.fixture
def finished(study: Path, compare: Callable[..., Answer]) -> Callable[..., Answer]:
    """``compare`` where all runs are finished: by the test above, or now if it did not run."""
    if not (study / "runs" / "tiny-psd-seed0" / "status.json").exists():
        assert compare()[0] == 0
    return compare


@pytest.mark.parametrize(
    ("change", "named"), [("optim.lr=0.01", "optim.lr: 0.001 -> 0.01"), ("max_steps=3", "max_steps: 7 -> 3")]
)
def test_runs_with_other_settings_are_refused(finished: Callable[..., Answer], change: str, named: str) -> None:
    code, _, err = finished(change)
    assert code == 2
    assert f"runs/tiny-none-seed0 was trained with other settings than the variant none with seed 0 ({named}" in err


def test_the_comparison_is_a_tracked_run_of_its_own(study: Path, finished: Callable[..., Answer]) -> None:
    ids = []
    for _ in range(2):  # the second one goes on with the first one's
        assert finished("tracking.kind=mlflow")[0] == 0
        client = MlflowClient(f"sqlite:///{study}/mlflow.db")
        (run,) = client.search_runs([client.get_experiment_by_name("dist-obdsd").experiment_id])
        ids.append(run.info.run_id)
    assert ids[0] == ids[1]
    assert run.info.status == "FINISHED"
    assert {file.path for file in client.list_artifacts(ids[0])} >= {"report.md", "report.png", "values.csv"}
    summary = json.loads((study / "runs" / "tiny-psd-seed0" / "summary.json").read_text())
    assert run.data.metrics["psd/last/recall_at_1/mean"] == summary["rows"][0]["value"]


def test_states_are_listed_and_reported_without_training(study: Path, finished: Callable[..., Answer]) -> None:
    code, out, _ = finished("--seeds", "2", "--dry-run")
    assert code == 0
    assert [line.split("  ")[0] for line in out.splitlines()] == ["finished", "not started"] * 2
    code, out, err = finished("--seeds", "2", "--report-only", "--out", "elsewhere")
    assert code == 1
    assert "2 of 4 runs are not finished" in err
    report = (study / "elsewhere" / "report.md").read_text()
    assert "2 of 4 runs are finished" in report
    assert "--report-only" not in report  # the command to reproduce it trains
    assert not (study / "runs" / "tiny-psd-seed1").exists()


def test_a_launcher_around_it_is_refused(compare: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"), "020x1", strict=True):
        monkeypatch.setenv(name, value)
    assert compare()[0] == 2
