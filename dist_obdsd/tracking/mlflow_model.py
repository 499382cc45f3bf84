"""A checkpoint as an MLflow model, which MLflow loads and serves.

The model holds no pickle: MLflow runs the file ``pyfunc_model.py``, which loads the weights as those of any checkpoint.
It carries this package's code and the part of the checkpoint that embedding needs.
"""

import io
import os
import tempfile
import warnings
import zipfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

import dist_obdsd
from dist_obdsd import checkpoint
from dist_obdsd.inference import inference_config

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

NAME = "model"
NEEDS = ("mlflow", "torch", "torchvision", "numpy", "pillow", "pydantic", "pyyaml")
"""Packages that loading the model imports."""


def log_model(client: "MlflowClient", run_id: str, path: Path) -> None:
    """Log a checkpoint as the model of a run.

    MLflow's global client is not touched, so this may run in any thread.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus
    from mlflow.models import Model

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # it would draw over the run's own lines
    state = checkpoint.load(path)
    run = client.get_run(run_id)
    logged = client.create_logged_model(run.info.experiment_id, NAME, run_id, model_type="embedder")
    ids = {"model_uuid": logged.model_id, "model_id": logged.model_id}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / NAME
        _write_model(state, folder, Model(artifact_path=logged.artifact_location, run_id=run_id, **ids))
        client.log_model_artifacts(logged.model_id, str(folder))
    client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=state["position"]["global_step"])])


def _write_model(state: dict[str, Any], folder: Path, model: Any) -> None:
    """Write the folder of an MLflow model from a checkpoint's content."""
    import pandas as pd
    from mlflow import pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec

    config = inference_config(state)
    rows = TensorSpec(np.dtype("float32"), (-1, config.model.embedding_dim), "embeddings")
    signature = ModelSignature(Schema([ColSpec(DataType.binary, "image")]), Schema([rows]))
    kept = ("format", "config", "manifest", "student", "position", "best_validation")  # the rest is for training
    example = io.BytesIO()
    Image.new("RGB", config.data.size[::-1]).save(example, "PNG")
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings(record=True):
        # Recorded and dropped: MLflow asks for type hints, though it is given the signature, behind any filter.
        weights, package = Path(place) / "checkpoint.pt", Path(place) / "dist_obdsd.zip"
        torch.save({name: state[name] if name in kept else None for name in checkpoint.ENTRIES}, weights)
        root = Path(dist_obdsd.__file__).parent
        with zipfile.ZipFile(package, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(root.rglob("*.py")):
                archive.write(file, Path(root.name) / file.relative_to(root))
        pyfunc.save_model(
            folder,
            python_model=str(Path(__file__).with_name("pyfunc_model.py")),
            artifacts={"checkpoint": str(weights), "package": str(package)},
            signature=signature,
            input_example=pd.DataFrame({"image": [example.getvalue()]}),
            # Given, since MLflow would load the model in a process of its own to find them out.
            pip_requirements=[f"{name}=={metadata.version(name).split('+')[0]}" for name in NEEDS],
            mlflow_model=model,
        )
