"""Real training runs and what MLflow has of them."""

import json
import signal
import subprocess
import sys
from pathlib import Path

from mlflow.tracking import MlflowClient

from dist_obdsd import checkpoint
from dist_obdsd.cli.main import main
from dist_obdsd.config import parse_config
from dist_obdsd.tracking import event_log
from dist_obdsd.tracking.tracker import build_tracker
from tests import runs


def the_run(uri: str, name: str, experiment: str = "dist-obdsd"):
    client = MlflowClient(uri)
    experiment_id = client.get_experiment_by_name(experiment).experiment_id
    (run,) = client.search_runs([experiment_id], f"attributes.run_name = '{name}'")
    return client, run


def points(client, run, name: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, name))


def test_a_run_is_in_mlflow_with_settings_losses_and_metrics(folder, server):
    done = runs.train(folder, "tracking.kind=mlflow", f"tracking.uri={server.uri}", ranks=2)
    assert "Warning" not in done.stderr
    client, run = the_run(server.uri, "tiny")
    assert run.info.status == "FINISHED"
    assert run.data.params["distillation.omega"] == "0.5"
    tags = run.data.tags
    assert (tags["world_size"], tags["launcher"]) == ("2", "environment")
    assert tags["checkpoint.last"].startswith(f"{folder}/runs/tiny/checkpoints/epoch-0003.pt (")
    summary = json.loads((folder / "runs" / "tiny" / "summary.json").read_text())
    (given,) = run.inputs.dataset_inputs
    assert given.dataset.digest == tags["manifest"][:36] == summary["meta"]["manifest"][:36]
    assert given.dataset.name == "folder"
    assert '"train": {"images": 96, "classes": 12}' in given.dataset.profile
    rows = runs.metrics(folder / "runs" / "tiny", "step")
    shown = {"ranking": "curves/loss_ranking", "distillation": "curves/loss_distillation", "ramp": "optimizer/ramp",
             "target_entropy": "target/entropy", "lr": "optimizer/lr", "seconds": "speed/step_seconds"}  # fmt: skip
    for name, chart in shown.items():
        assert points(client, run, chart) == [(row["step"], row[name]) for row in rows if name in row]
    value = next(row["value"] for row in summary["rows"] if row["metric"] == "recall@1")
    assert run.data.metrics["test/recall_at_1"] == value
    assert {file.path for file in client.list_artifacts(run.info.run_id)} >= {"config.yaml", "summary.json"}
    # Two ranks on one node, which tells its state once per interval (5) and at the end of an epoch (6 steps each).
    memory = points(client, run, "system/node-0/system_memory_usage_percentage")
    assert [step for step, _ in memory] == [5, 6, 10, 12, 15, 18]
    assert all(0 < value < 100 for _, value in memory)
    assert "system/node-1/system_memory_usage_percentage" not in run.data.metrics


def test_a_comparison_has_its_runs_below_it_with_figures_and_models(folder, server):
    done = runs.program(
        "compare", "tiny.yaml", "--variants", "psd", "--seeds", "1", "epochs=2", "max_steps=8", "data.workers=0",
        "tracking.kind=mlflow", f"tracking.uri={server.uri}", "tracking.experiment=compared", "tracking.figures=true",
        cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    client, parent = the_run(server.uri, "tiny-comparison", "compared")
    run = the_run(server.uri, "tiny-psd-seed0", "compared")[1]
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id  # the UI folds the children under it
    assert {run.info.status, parent.info.status} == {"FINISHED"}
    assert "report.png" in {file.path for file in client.list_artifacts(parent.info.run_id)}
    drawn = {f"figures/{path.name}" for path in (folder / "runs/tiny-psd-seed0/figures").glob("*.png")}
    assert {file.path for file in client.list_artifacts(run.info.run_id, "figures")} == drawn
    assert "figures/retrieval_grid.png" in drawn
    assert len(run.outputs.model_outputs) == 1


# Between two checkpoints, at 6 and 12 steps, and when the server has some of the steps that will be done again.
KILLS_ITSELF = """import json, pathlib
        path = pathlib.Path("runs/tiny/tracking.state.json")
        while b'"step": 8' not in path.with_name("tracking.jsonl").read_bytes()[:json.loads(path.read_text())["sent"]]:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)"""


def test_a_killed_run_and_a_hanging_server_leave_one_run_with_every_step_once(folder, server):
    settings = ("tracking.kind=mlflow", f"tracking.uri={server.uri}", "tracking.wait_seconds=0.5",
                "tracking.experiment=killed", "data.workers=0")  # fmt: skip
    run_dir = folder / "runs" / "tiny"
    killed = breaks(folder, KILLS_ITSELF, 11, *settings)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with server.hanging():
        done = runs.program("train", "tiny.yaml", *settings, cwd=folder, env={"MLFLOW_HTTP_REQUEST_TIMEOUT": "60"})
    assert done.returncode == 0, done.stderr
    assert "6 steps are done" in done.stdout
    assert done.stdout.count("tracking at ") == 1
    assert "`dist-obdsd replay runs/tiny` sends the rest" in done.stdout
    rows = runs.metrics(run_dir, "step")
    assert [row["step"] for row in rows] == list(range(18))
    # A call that waited for this server would take a minute.
    assert max(row["seconds"] for row in rows[6:]) < 30

    replayed = runs.program("replay", "runs/tiny", cwd=folder)
    assert replayed.returncode == 0, replayed.stderr
    client, run = the_run(server.uri, "tiny", "killed")
    assert run.info.status == "FINISHED"
    assert checkpoint.load(run_dir)["tracker"] == run.info.run_id
    assert json.loads((run_dir / "summary.json").read_text())["meta"]["tracked_run"] == run.info.run_id
    assert len(run.outputs.model_outputs) == 1
    assert {file.path for file in client.list_artifacts(run.info.run_id)} >= {"config.yaml", "summary.json"}
    assert points(client, run, "curves/loss_ranking") == [(row["step"], row["ranking"]) for row in rows]
    for name in run.data.metrics:  # clock times, too, which differ when a step is done again
        at = [step for step, _ in points(client, run, name)]
        assert len(at) == len(set(at)), name
    assert [step for step, _ in points(client, run, "speed/step_seconds")] == list(range(18))


def breaks(folder: Path, what: str, step: int, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Train, and do something to the process before a step."""
    return runs.program("train", "tiny.yaml", *overrides, cwd=folder, code=runs.at_step(what, step))


def test_a_signal_is_a_kill_and_an_error_a_failure(folder, server):
    settings = ("tracking.kind=mlflow", f"tracking.uri={server.uri}", "tracking.experiment=statuses")
    done = breaks(folder, "os.kill(os.getpid(), signal.SIGTERM)", 2, *settings)
    assert done.returncode == 75, done.stderr  # go on later
    run = the_run(server.uri, "tiny", "statuses")[1]
    assert run.info.status == "KILLED"
    assert breaks(folder, "raise OSError(5, 'no')", 5, *settings).returncode == 1
    failed = the_run(server.uri, "tiny", "statuses")[1]
    assert (failed.info.run_id, failed.info.status) == (run.info.run_id, "FAILED")


def test_replay_refuses_what_is_no_event_log(tmp_path, capsys):
    assert main(["replay", str(tmp_path)]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_without_mlflow_the_run_goes_on_and_is_sent_later(tmp_path, monkeypatch, caplog):
    for name in ("mlflow.tracking", "sqlalchemy.engine"):
        monkeypatch.setitem(sys.modules, name, None)
    caplog.set_level("INFO", "dist_obdsd")
    settings = parse_config({"name": "x", "output": str(tmp_path), "epochs": 2, "data": {"shards": "s"}}, "test")
    settings.run_dir.mkdir()
    tracker = build_tracker(settings, settings.run_dir, "m", None, {})
    tracker.params({"a": 1})
    tracker.metrics({"b": 2.0}, 0)
    tracker.close("FINISHED")
    (said,) = caplog.messages
    assert "pip install mlflow" in said
    kinds = [event["kind"] for event, _ in event_log.read_events(settings.run_dir / event_log.NAME)]
    assert kinds == ["start", "params", "metrics", "end"]
