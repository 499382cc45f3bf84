"""Finds on a CPU where a step would make a GPU's host wait, or would mix tensors of the two.

A shadow follows by provenance which tensors would lie on the device: those it is given, what is made with ``device=``,
what ``.to(device)`` returns, and all that is computed from them. ``found`` has the places of waits and mixes, such as
``manifold/solvers.py:141 _local_scalar_dense``, in the real backward, too. ``transfer.py`` may wait: for an event in
the queue, not for what comes after it. ``looks`` counts that.
"""

import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import dist_obdsd
from dist_obdsd.training.train_step import TrainStep
from dist_obdsd.transfer import AsyncHostCopy

PACKAGE = Path(dist_obdsd.__file__).parent
DEPENDS_ON_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
LOOKS_AT_VALUES = {"_linalg_check_errors", "_linalg_eigh", "_linalg_svd", "histc", "linalg_eig", "multinomial"}
"""Operations whose errors or kernels depend on values, without such a tag."""
HANDED_OUT = (Tensor.cpu, Tensor.tolist, Tensor.numpy, Tensor.__array__)
TAKEN_IN = (torch.tensor, torch.as_tensor, torch.asarray)
MASKS = (torch.bool, torch.uint8)


class Shadow:
    """A context, in which ``of`` and what is computed from it lie on the device."""

    def __init__(self, of: Iterable[Tensor | None]) -> None:
        self.found: list[str] = []
        self.looks = 0
        self._on: set[StorageWeakRef] = set()
        self.put(*of)
        self._modes = (_Operations(self), _Calls(self))

    def put(self, *tensors: Tensor | None) -> None:
        """Let tensors lie on the device, with all that shares their memory."""
        self._on |= {StorageWeakRef(x.untyped_storage()) for x in tensors if x is not None}

    def has(self, x: Any) -> bool:
        """Tell whether a tensor lies on the device."""
        return isinstance(x, Tensor) and StorageWeakRef(x.untyped_storage()) in self._on

    def note(self, what: str) -> None:
        """Remember what waits or mixes, with the line of the package that is running."""
        stack = traceback.extract_stack()
        frames = [frame for frame in stack if frame.filename.startswith(str(PACKAGE))]
        if frames and any("torch/distributed/" in frame.filename for frame in stack[stack.index(frames[-1]) :]):
            return  # gloo's own copies, which NCCL has not
        place = Path(frames[-1].filename).relative_to(PACKAGE) if frames else "elsewhere"
        if str(place) != "transfer.py":
            self.found.append(f"{place}:{frames[-1].lineno} {what}" if frames else f"elsewhere {what}")

    def __enter__(self) -> "Shadow":
        self._read = read = AsyncHostCopy.read

        def counted(copy: AsyncHostCopy) -> list[float]:
            self.looks += 1
            return read(copy)

        AsyncHostCopy.read = counted
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)
        AsyncHostCopy.read = self._read


class _Operations(TorchDispatchMode):
    def __init__(self, shadow: Shadow) -> None:
        super().__init__()
        self._shadow = shadow

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shadow, kwargs = self._shadow, kwargs or {}
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        there = [x for x in tensors if shadow.has(x)]
        if not there:
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        copies = name == "copy_"
        here = [tuple(x.shape) for x in tensors if not shadow.has(x) and (x.dim() or copies)]
        if _looks_at_values(func, name, args):
            shadow.note(name)
        elif here:  # a kernel takes a number of the host along, but nothing larger
            shadow.note(f"{name} mixes in the host's {here[0]}")
        result = func(*args, **kwargs)
        if not copies and name != "_local_scalar_dense":
            shadow.put(*[x for x in tree_iter(result) if isinstance(x, Tensor)])
        return result


class _Calls(TorchFunctionMode):
    """The calls that reach no dispatcher: numbers handed out or taken in as a whole, and moves between devices."""

    def __init__(self, shadow: Shadow) -> None:
        super().__init__()
        self._shadow = shadow

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shadow, kwargs = self._shadow, kwargs or {}
        there = bool(args) and shadow.has(args[0])
        if func is Tensor.to:
            return self._moved(there, args, kwargs)
        if (func in HANDED_OUT or func is Tensor.new_tensor) and there:
            shadow.note(func.__name__)
        result = func(*args, **kwargs)
        if isinstance(kwargs.get("device"), torch.device) and isinstance(result, Tensor):
            if func in TAKEN_IN:
                shadow.note(func.__name__)
            shadow.put(result)
        return result.clone() if func is Tensor.cpu and there else result

    def _moved(self, there: bool, args: Any, kwargs: Any) -> Tensor:
        """Note a copy between the two. The device is said as ``torch.device``, or by a tensor there; "cpu" is here."""
        shadow, wanted = self._shadow, [*args[1:2], *kwargs.values()]
        up = any(isinstance(x, torch.device) or shadow.has(x) for x in wanted)
        down = any(isinstance(x, str) for x in wanted)
        result = args[0].to(*args[1:], **kwargs)
        if (up and not there) or (down and there):
            shadow.note("to")
            result = result.clone() if result is args[0] else result
        if up:
            shadow.put(result)
        elif down:
            with torch._C.DisableTorchFunctionSubclass(), torch.utils._python_dispatch._disable_current_modes():
                result = result.clone()  # of what is there, but here
        return result


def _looks_at_values(func: Any, name: str, args: Any) -> bool:
    """Tell whether the host must know values for it. To put one number in by a mask, it need not."""
    if not name.startswith("index") or not isinstance(args[1], (list, tuple)):
        return name in LOOKS_AT_VALUES or not DEPENDS_ON_VALUES.isdisjoint(func.tags)
    masked = any(isinstance(x, Tensor) and x.dtype in MASKS for x in args[1])
    return masked and not (name.startswith("index_put") and args[2].numel() == 1)


def tensors_of(step: TrainStep) -> list[Tensor | None]:
    """List what a training step keeps on its device: networks, gradients, optimizers, the objective's state."""
    networks = [step.strategy.student, step.objective.ranking, *([step.teacher.network] if step.teacher else [])]
    kept = [x for network in networks for x in (*network.parameters(), *network.buffers())]
    optimizers = [step.strategy.optimizer, step.strategy.objective_optimizer]
    states = [dict(o.state) for o in optimizers if isinstance(o, torch.optim.Optimizer)]
    in_states = [x for x in tree_iter(states) if isinstance(x, Tensor)]
    return [*kept, *(x.grad for x in kept), step.objective.memory_MD, *in_states]
