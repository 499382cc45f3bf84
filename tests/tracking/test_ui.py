"""What the MLflow UI asks a real server for when somebody opens a comparison in it."""

import json
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from tests import runs
from tests.tracking.server import Server


def ask(server: Server, path: str, body: dict[str, Any] | None = None) -> bytes:
    """One request of the UI: a GET, or a POST of JSON."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.uri + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()


def api(server: Server, call: str, body: dict[str, Any] | None = None, **query: Any) -> Any:
    question = f"?{urllib.parse.urlencode(query, doseq=True)}" if query else ""
    return json.loads(ask(server, f"/ajax-api/2.0/mlflow/{call}{question}", body))


def image(server: Server, run_id: str, path: str) -> bytes:
    return ask(server, "/get-artifact?" + urllib.parse.urlencode({"path": path, "run_uuid": run_id}))


def test_a_comparison_shows_its_runs_curves_figures_and_models(folder: Path, server: Server) -> None:
    done = runs.program(
        "compare", "tiny.yaml", "--arms", "none,psd", "--seeds", "1", "epochs=2", "max_steps=8", "data.workers=0",
        "tracking.kind=mlflow", f"tracking.uri={server.uri}", "tracking.experiment=opened", "tracking.figures=true",
        cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert b'<div id="root"' in ask(server, "/")

    experiment = api(server, "experiments/get-by-name", experiment_name="opened")["experiment"]["experiment_id"]
    found = api(server, "runs/search", {"experiment_ids": [experiment], "max_results": 100})["runs"]
    by_name = {run["info"]["run_name"]: run for run in found}
    assert sorted(by_name) == ["tiny-comparison", "tiny-none-seed0", "tiny-psd-seed0"]
    assert {run["info"]["status"] for run in found} == {"FINISHED"}
    parent = by_name.pop("tiny-comparison")
    ids = {name: run["info"]["run_id"] for name, run in by_name.items()}
    for run in by_name.values():
        tags = {tag["key"]: tag["value"] for tag in run["data"]["tags"]}
        assert tags["mlflow.parentRunId"] == parent["info"]["run_id"]  # the UI folds the children under it

    # The chart of both runs.
    points = api(
        server,
        "metrics/get-history-bulk-interval",
        run_ids=list(ids.values()),
        metric_key="curves/loss_ranking",
        max_results=100,
    )["metrics"]
    for name, run_id in ids.items():
        shown = [(point["step"], point["value"]) for point in points if point["run_id"] == run_id]
        assert shown == [(row["step"], row["ranking"]) for row in runs.metrics(folder / "runs" / name, "step")]

    # The pictures of a run and of the comparison.
    files = api(server, "artifacts/list", run_id=ids["tiny-psd-seed0"], path="figures")["files"]
    pictures = [file["path"] for file in files if file["path"].endswith(".png")]
    assert {"batch_manifold.png", "retrieval_grid.png", "loss_curves.png"} <= {Path(path).name for path in pictures}
    drawn = folder / "runs" / "tiny-psd-seed0" / "figures"
    for path in pictures:
        assert image(server, ids["tiny-psd-seed0"], path) == (drawn / Path(path).name).read_bytes()
    assert image(server, parent["info"]["run_id"], "report.png").startswith(b"\x89PNG")

    # The models, with what they take and give.
    models = api(server, "logged-models/search", {"experiment_ids": [experiment]})["models"]
    assert {model["info"]["source_run_id"] for model in models} == set(ids.values())
    assert {model["info"]["status"] for model in models} == {"LOGGED_MODEL_READY"}
