"""dist-obdsd: distributed deep metric learning with self-distillation and online diffusion on batch manifolds."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_obdsd.inference import load

__all__ = ["__version__", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # torch takes seconds to import, which `import dist_obdsd` alone shall not cost.
    if name == "load":
        from dist_obdsd.inference import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
