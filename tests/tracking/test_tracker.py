import json
import sys

from mlflow.tracking import MlflowClient

from dist_obdsd.config import Tracking
from dist_obdsd.tracking.tracker import MLflowTracker, Tracker, build_tracker
from tests import runs
from tests.training.conftest import folder, shards  # noqa: F401


def test_a_run_is_in_mlflow_with_settings_losses_and_metrics(folder):  # noqa: F811
    runs.train(folder, "tracking.kind=mlflow", ranks=2)
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("dist-obdsd").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["distillation.omega"] == "0.5"
    assert run.data.tags["world_size"] == "2"
    steps = runs.metrics(folder / "runs" / "tiny", "step")
    history = sorted(client.get_metric_history(run.info.run_id, "ranking"), key=lambda metric: metric.step)
    assert [(m.step, m.value) for m in history] == [(row["step"], row["ranking"]) for row in steps]
    summary = json.loads((folder / "runs" / "tiny" / "summary.json").read_text())
    value = next(row["value"] for row in summary["rows"] if row["metric"] == "recall@1")
    assert run.data.metrics["test/recall_at_1"] == value
    assert {file.path for file in client.list_artifacts(run.info.run_id)} >= {"config.yaml", "summary.json"}


def test_a_resumed_run_continues_the_same_mlflow_run(folder):  # noqa: F811
    runs.train(folder, "tracking.kind=mlflow", "max_steps=4")
    runs.train(folder, "tracking.kind=mlflow")
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("dist-obdsd").experiment_id])
    history = client.get_metric_history(run.info.run_id, "ranking")
    assert sorted(m.step for m in history) == [row["step"] for row in runs.metrics(folder / "runs" / "tiny", "step")]


def test_an_unreachable_server_is_told_once_and_the_run_goes_on(folder):  # noqa: F811
    done = runs.train(folder, "tracking.kind=mlflow", "tracking.uri=http://127.0.0.1:9", "max_steps=3")
    assert done.stdout.count("tracking at http://127.0.0.1:9 stopped") == 1
    assert runs.status(folder / "runs" / "tiny")["state"] == "finished"


def test_without_mlflow_the_run_goes_on(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow.tracking", None)
    monkeypatch.setitem(sys.modules, "mlflow.entities", None)
    said: list[str] = []
    tracker = build_tracker(Tracking(), "x", None, {}, True, said.append)
    tracker.params({"a": 1})
    tracker.metrics({"b": 2.0}, 0)
    tracker.close("FINISHED")
    assert len(said) == 1
    assert "the run goes on" in said[0]


def test_only_the_main_rank_has_a_tracker(tmp_path):
    settings = Tracking(uri=f"sqlite:///{tmp_path}/m.db")
    other = build_tracker(settings, "x", None, {}, False, print)
    assert type(other) is Tracker
    other.metrics({"a": 1.0}, 0)
    other.close("FINISHED")
    assert not (tmp_path / "m.db").exists()
    assert isinstance(build_tracker(settings, "x", None, {}, True, print), MLflowTracker)
