"""dist-obdsd: distributed deep metric learning with self-distillation and online diffusion on batch manifolds."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_obdsd.evaluation.evaluator import evaluate
    from dist_obdsd.inference import load

__all__ = ["__version__", "evaluate", "load"]
__version__ = "0.1.0"

_MODULES = {
    "evaluate": "dist_obdsd.evaluation.evaluator",
    "load": "dist_obdsd.inference",
}


def __getattr__(name: str) -> Any:
    # torch takes seconds to import, which `import dist_obdsd` alone shall not cost.
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
