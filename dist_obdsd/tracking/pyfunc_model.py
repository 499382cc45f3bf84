"""The file that MLflow runs to load a logged model, which holds a copy of it."""

import base64
import binascii
import sys
from typing import Any

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext


class EmbeddingModel(PythonModel):
    """Embeds a column ``image`` as float32 rows [n, D] of unit length."""

    def load_context(self, context: PythonModelContext) -> None:
        sys.path.append(context.artifacts["package"])  # last: one that is installed comes first
        from dist_obdsd.inference import load

        self.embedder = load(context.artifacts["checkpoint"])

    # Without type hints, from which MLflow would make a signature of its own.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Embed the column ``image`` of a DataFrame, float32 [n, D].

        It holds the bytes of image files (as base64 in JSON and CSV) or arrays [H, W] or [H, W, C] of pixels.
        """
        return self.embedder([_image(value, place) for place, value in enumerate(model_input["image"])]).numpy()


def _image(value: Any, place: int) -> Any:
    if not isinstance(value, str):
        return value
    try:  # a text is never a path: callers have no business with this machine's
        return base64.b64decode(value)
    except binascii.Error as error:
        raise ValueError(f"image {place} is a text that is not base64; send the bytes of an image file") from error


set_model(EmbeddingModel())
