"""Real training runs and what MLflow has of them."""

import signal
import sys

from mlflow.tracking import MlflowClient

from dist_obdsd import checkpoint
from dist_obdsd.config import parse_config
from dist_obdsd.tracking import event_log
from dist_obdsd.tracking.mlflow_backend import metric_name
from dist_obdsd.tracking.tracker import build_tracker
from tests import runs


def the_run(uri, name, experiment="dist-obdsd"):
    client = MlflowClient(uri)
    experiment_id = client.get_experiment_by_name(experiment).experiment_id
    (run,) = client.search_runs([experiment_id], f"attributes.run_name = '{name}'")
    return client, run


def points(client, run, name):
    return sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, name))


def test_a_run_is_in_mlflow_with_settings_losses_and_metrics(folder, run, server):
    done = runs.train(folder, "tracking.kind=mlflow", f"tracking.uri={server.uri}", ranks=2)
    assert "Warning" not in done.stderr
    client, tracked = the_run(server.uri, "tiny")
    assert tracked.info.status == "FINISHED"
    assert tracked.data.params["distillation.omega"] == "0.5"
    tags = tracked.data.tags
    assert (tags["world_size"], tags["launcher"]) == ("2", "environment")
    assert tags["checkpoint.last"].startswith(f"{run}/checkpoints/epoch-0003.pt (")
    summary = runs.summary(run)
    (given,) = tracked.inputs.dataset_inputs
    assert given.dataset.digest == tags["manifest"][:36] == summary["meta"]["manifest"][:36]
    rows = runs.metrics(run, "step")
    for name in ("ranking", "distillation", "ramp", "target_entropy", "lr", "seconds"):
        assert points(client, tracked, metric_name(name)) == [(row["step"], row[name]) for row in rows if name in row]
    value = next(row["value"] for row in summary["rows"] if row["metric"] == "recall@1")
    assert tracked.data.metrics["test/recall_at_1"] == value
    assert {file.path for file in client.list_artifacts(tracked.info.run_id)} >= {"config.yaml", "summary.json"}
    # Two ranks on one node, which tells its state once per interval (5) and at the end of an epoch (6 steps each).
    memory = points(client, tracked, "system/node-0/system_memory_usage_percentage")
    assert [step for step, _ in memory] == [5, 6, 10, 12, 15, 18]
    assert all(0 < value < 100 for _, value in memory)
    assert "system/node-1/system_memory_usage_percentage" not in tracked.data.metrics


def test_a_comparison_is_the_parent_of_its_tracked_runs(folder, server):
    asked = (
        "compare", "tiny.yaml", "--variants", "psd", "--seeds", "1", "epochs=2", "max_steps=8", "data.workers=0",
        "tracking.kind=mlflow", f"tracking.uri={server.uri}", "tracking.experiment=compared", "tracking.figures=true",
    )  # fmt: skip
    runs.program(*asked, cwd=folder)
    first = the_run(server.uri, "tiny-comparison", "compared")[1]
    runs.program(*asked, cwd=folder)  # which goes on with the first one's run
    client, parent = the_run(server.uri, "tiny-comparison", "compared")
    assert parent.info.run_id == first.info.run_id
    first_row = runs.summary(folder / "runs" / "tiny-psd-seed0")["rows"][0]
    assert parent.data.metrics["psd/last/recall_at_1/mean"] == first_row["value"]
    run = the_run(server.uri, "tiny-psd-seed0", "compared")[1]
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id  # the UI folds the children under it
    assert {run.info.status, parent.info.status} == {"FINISHED"}
    files = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert files >= {"report.md", "report.png", "values.csv"}
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


def test_a_kill_and_a_hanging_server_lose_and_double_no_step(folder, run, server):
    settings = ("tracking.kind=mlflow", f"tracking.uri={server.uri}", "tracking.wait_seconds=0.5",
                "tracking.experiment=killed", "data.workers=0")  # fmt: skip
    runs.train(folder, *settings, code=runs.at_step(KILLS_ITSELF, 11), exits=-signal.SIGKILL)
    with server.hanging():
        done = runs.train(folder, *settings, env={"MLFLOW_HTTP_REQUEST_TIMEOUT": "60"})
    assert "6 steps are done" in done.stdout
    assert done.stdout.count("tracking at ") == 1
    assert "`dist-obdsd replay runs/tiny` sends the rest" in done.stdout
    rows = runs.metrics(run, "step")
    assert [row["step"] for row in rows] == list(range(18))
    # A call that waited for this server would take a minute.
    assert max(row["seconds"] for row in rows[6:]) < 30

    runs.program("replay", "runs/tiny", cwd=folder)
    client, tracked = the_run(server.uri, "tiny", "killed")
    assert tracked.info.status == "FINISHED"
    assert checkpoint.load(run)["tracker"] == tracked.info.run_id
    assert runs.summary(run)["meta"]["tracked_run"] == tracked.info.run_id
    assert points(client, tracked, "curves/loss_ranking") == [(row["step"], row["ranking"]) for row in rows]
    for name in tracked.data.metrics:  # clock times, too, which differ when a step is done again
        at = [step for step, _ in points(client, tracked, name)]
        assert len(at) == len(set(at)), name
    assert [step for step, _ in points(client, tracked, "speed/step_seconds")] == list(range(18))


def test_a_signal_is_a_kill_and_an_error_a_failure(folder, server):
    settings = ("tracking.kind=mlflow", f"tracking.uri={server.uri}", "tracking.experiment=statuses")
    runs.train(folder, *settings, code=runs.at_step("os.kill(os.getpid(), signal.SIGTERM)", 2), exits=75)
    run = the_run(server.uri, "tiny", "statuses")[1]
    assert run.info.status == "KILLED"
    runs.train(folder, *settings, code=runs.at_step("raise OSError(5, 'no')", 5), exits=1)
    failed = the_run(server.uri, "tiny", "statuses")[1]
    assert (failed.info.run_id, failed.info.status) == (run.info.run_id, "FAILED")


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
