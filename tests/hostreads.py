"""Finds on a CPU where a GPU would make the host wait: a step must not read what the device computes.

A GPU works through a queue, and whoever asks for a number waits until the queue is empty. On a CPU nobody notices, so
two modes look at every operation: values that come from floating-point tensors (pixels, weights, losses) may not be
turned into Python numbers or into shapes, and no tensor may be made on the device from Python numbers, which is a copy
from memory that is not pinned and waits, too. Labels are integers that the host has anyway, so they may be read. So may
what ``transfer.py`` hands out, which waits for an event in the queue and not for what comes after it.
"""

import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

READING = {
    "_local_scalar_dense", "_unique2", "equal", "is_nonzero", "item", "masked_select", "nonzero", "nonzero_numpy",
    "unique_consecutive", "unique_dim",
}  # fmt: skip
PACKAGE = Path(__file__).parents[1] / "dist_obdsd"
EVENTS = "transfer.py"


class HostReads:
    """A context; afterwards ``found`` has the places, such as ``objective/solvers.py:141 _local_scalar_dense``."""

    def __init__(self) -> None:
        self.found: list[str] = []
        values = _Values(self.found)
        self._modes = [values, _Calls(self.found, values)]

    def __enter__(self) -> "HostReads":
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class _Values(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found
        self._computed = WeakIdKeyDictionary()
        """Tensors without a fraction that come from tensors with one, such as masks and indices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [x for x in tree_iter((args, kwargs or {})) if isinstance(x, Tensor)]
        computed = any(self.is_computed(x) for x in inputs)
        name = func._schema.name.removeprefix("aten::")
        if computed and (name in READING or (name.startswith("index") and _masks(args))):
            _note(self._found, name)
        result = func(*args, **(kwargs or {}))
        if computed:
            for x in tree_iter(result):
                if isinstance(x, Tensor) and not x.is_floating_point():
                    self._computed[x] = True
        return result

    def is_computed(self, x: Tensor) -> bool:
        return x.is_floating_point() or x in self._computed


class _Calls(TorchFunctionMode):
    """What reaches no dispatcher: numbers that are handed out or taken in as a whole."""

    def __init__(self, found: list[str], values: _Values) -> None:
        super().__init__()
        self._found, self._values = found, values

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None
        if made or (func in (Tensor.new_tensor, Tensor.tolist, Tensor.numpy) and self._values.is_computed(args[0])):
            _note(self._found, func.__name__)
        return func(*args, **kwargs)


def _masks(args: Any) -> bool:
    """Whether something is picked by a mask, whose number of hits decides a shape."""
    indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else []
    return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in indices)


def _note(found: list[str], what: str) -> None:
    place = _place()
    if not place.startswith(EVENTS):
        found.append(f"{place} {what}")


def _place() -> str:
    """The line of the package that is running."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(str(PACKAGE)):
            return f"{Path(frame.filename).relative_to(PACKAGE)}:{frame.lineno}"
    return "elsewhere"
