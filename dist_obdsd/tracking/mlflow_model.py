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


def log_model(client: "MlflowClient", run_id: str, path: Path) -> str:
    """Log a checkpoint as the model of a run.

    Args:
        client: of the tracking store; MLflow's global one is not touched, so this may run in any thread.
        run_id: a run that exists.
        path: a run folder or a checkpoint file.

    Returns:
        ``models:/...``, the model's address for MLflow.

    Raises:
        InputError: there is no such checkpoint.
        Whatever MLflow raises where the store cannot be reached.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus
    from mlflow.models import Model

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # it would draw over the run's own lines
    state = checkpoint.load(path)
    with tempfile.TemporaryDirectory() as place:
        run = client.get_run(run_id)
        logged = client.create_logged_model(run.info.experiment_id, NAME, run_id, model_type="embedder")
        model = Model(
            artifact_path=logged.artifact_location,
            run_id=run_id,
            model_uuid=logged.model_id,
            model_id=logged.model_id,
        )
        folder = Path(place) / NAME
        write_model(state, folder, model)
        client.log_model_artifacts(logged.model_id, str(folder))
    client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=state["position"]["global_step"])])
    return str(logged.model_uri)


def write_model(state: dict[str, Any], folder: Path, model: Any = None) -> None:
    """Write the folder of an MLflow model.

    Args:
        state: a checkpoint's content.
        folder: is made; must not exist.
        model: MLflow's own entry about the model; None: a new one.
    """
    import pandas as pd
    from mlflow import pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec

    config = inference_config(state)
    rows = TensorSpec(np.dtype("float32"), (-1, config.model.embedding_dim), "embeddings")
    signature = ModelSignature(Schema([ColSpec(DataType.binary, "image")]), Schema([rows]))
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings(record=True):
        # Recorded and dropped: MLflow asks for type hints, though it is given the signature, behind any filter.
        weights, package = Path(place) / "checkpoint.pt", Path(place) / "dist_obdsd.zip"
        torch.save(_for_embedding(state), weights)
        _write_package(package)
        pyfunc.save_model(
            folder,
            python_model=str(Path(__file__).with_name("pyfunc_model.py")),
            artifacts={"checkpoint": str(weights), "package": str(package)},
            signature=signature,
            input_example=pd.DataFrame({"image": [_example(*config.data.size)]}),
            # Given, since MLflow would load the model in a process of its own to find them out.
            pip_requirements=[f"{name}=={metadata.version(name).split('+')[0]}" for name in NEEDS],
            mlflow_model=model,
        )


def _for_embedding(state: dict[str, Any]) -> dict[str, Any]:
    """Empty a checkpoint's entries that only training needs; it still loads."""
    kept = ("format", "config", "manifest", "student", "position", "best_validation")
    return {name: state[name] if name in kept else None for name in checkpoint.ENTRIES}


def _write_package(path: Path) -> None:
    """Write this package's code as one zip file, to import from."""
    root = Path(dist_obdsd.__file__).parent
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(root.rglob("*.py")):
            archive.write(file, Path(root.name) / file.relative_to(root))


def _example(rows: int, columns: int) -> bytes:
    """Return a PNG of a ramp, to show what a request looks like."""
    stream = io.BytesIO()
    Image.fromarray(np.tile(np.linspace(0, 255, columns).astype(np.uint8), (rows, 1))).save(stream, "PNG")
    return stream.getvalue()
