"""A Python in which most of the packages that the project can use are not installed, and whatever it starts.

A ``sitecustomize`` module is imported by every Python that finds one; this one hides packages by name, so that they
look as on a machine that never had them.
"""

import os
from pathlib import Path

NEEDED = ("torch", "torchvision", "webdataset", "pydantic", "yaml")
"""What there must be, with what these need themselves."""
HIDDEN = (
    "_pytest", "deepspeed", "faiss", "hypothesis", "matplotlib", "mlflow", "onnx", "onnxruntime", "onnxscript",
    "pandas", "psutil", "pyarrow", "pynvml", "pytest", "pytorch_metric_learning", "rich", "scipy", "sklearn", "tqdm",
)  # fmt: skip
SITE = f"""
import sys
from importlib.machinery import PathFinder

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {HIDDEN} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
"""


def environment(folder: Path) -> dict[str, str]:
    """Variables that make a Python bare; ``folder`` holds what they name."""
    (folder / "sitecustomize.py").write_text(SITE)
    paths = [str(folder), str(Path(__file__).parents[1])]
    return {"PYTHONPATH": os.pathsep.join(paths)}
