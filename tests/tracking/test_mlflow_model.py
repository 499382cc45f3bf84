"""The logged model, loaded and asked by MLflow's own means."""

import base64
import json
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.tracking import MlflowClient
from PIL import Image

import dist_obdsd
from dist_obdsd.errors import InputError


@pytest.fixture
def model_uri(trained, monkeypatch):
    """The model that the tiny run logged, with the run's store as MLflow's own."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{trained}/mlflow.db")
    monkeypatch.chdir(trained)  # where the run kept its artifacts
    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("dist-obdsd").experiment_id])
    return f"runs:/{run.info.run_id}/model"


def best(trained):
    return dist_obdsd.load(trained / "runs" / "tiny", which="best")


def some(trained):
    return [trained / "images" / f"class_{c:02d}" / "3.png" for c in (0, 7, 20)]


def test_bytes_and_arrays_give_the_checkpoint_s_rows(trained, model_uri):
    model = mlflow.pyfunc.load_model(model_uri)
    wanted = best(trained)(some(trained)).numpy()
    files = [path.read_bytes() for path in some(trained)]
    arrays = [np.asarray(Image.open(path)) for path in some(trained)]
    for images in (files, arrays):
        rows = model.predict(pd.DataFrame({"image": images}))
        assert rows.dtype == np.float32
        np.testing.assert_allclose(rows, wanted, atol=1e-6)
    assert "'image': binary" in str(model.metadata.signature)
    assert "Tensor('float32', (-1, 16))" in str(model.metadata.signature)
    assert model.predict(model.metadata.load_input_example()).shape == (1, 16)
    for bad, words in ((b"none", "image 1 cannot be embedded"), (str(some(trained)[0]), "not base64|cannot be")):
        with pytest.raises((InputError, ValueError), match=words):
            model.predict(pd.DataFrame({"image": [files[0], bad]}))


def test_it_is_the_best_epoch_without_pickles_and_optimizer(trained, model_uri, tmp_path):
    folder = Path(mlflow.artifacts.download_artifacts(model_uri, dst_path=str(tmp_path)))
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"MLmodel", "pyfunc_model.py", "checkpoint.pt", "dist_obdsd.zip"} <= {path.name for path in files}
    assert not [path for path in files if path.suffix in (".pkl", ".pickle")]
    weights = folder / "artifacts" / "checkpoint.pt"
    assert weights.stat().st_size < best(trained).path.stat().st_size / 2
    logged = dist_obdsd.load(weights).network.state_dict()
    assert all(torch.equal(logged[name], value) for name, value in best(trained).network.state_dict().items())


# Runs MLflow's program where neither the package's checkout nor an installed one can be imported.
ALONE = """
import importlib.metadata, sys
sys.path[:] = [path for path in sys.path if not __import__("pathlib").Path(path, "dist_obdsd", "__init__.py").exists()]
from mlflow.cli import cli
try:
    cli()
finally:
    import dist_obdsd
    print("code from", dist_obdsd.__file__, file=sys.stderr)
"""


def test_mlflow_models_predict_works_without_the_package(trained, model_uri, tmp_path):
    texts = [[base64.b64encode(path.read_bytes()).decode()] for path in some(trained)]
    (tmp_path / "in.json").write_text(json.dumps({"dataframe_split": {"columns": ["image"], "data": texts}}))
    done = subprocess.run(
        [sys.executable, "-c", ALONE, "models", "predict", "--env-manager", "local", "-m", model_uri,
         "-i", "in.json", "-o", "out.json", "-t", "json"],
        capture_output=True, text=True, check=False, cwd=tmp_path, timeout=300,
    )  # fmt: skip
    assert (tmp_path / "out.json").is_file(), done.stderr
    assert "dist_obdsd.zip" in done.stderr.split("code from ")[1]
    rows = np.array(json.loads((tmp_path / "out.json").read_text())["predictions"])
    np.testing.assert_allclose(rows, best(trained)(some(trained)), atol=1e-5)
