"""Copies between a GPU's memory and the host's, without one waiting for the other.

A GPU copies from and to pinned memory by itself, while kernels run. The driver first makes its own copy of any other
memory, and may wait for the work that is queued on the GPU. On a CPU nothing is copied.
"""

import contextlib
import math
import time
from collections import deque
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

POLL_SECONDS = 5e-5
_STILL_PINNED: list[np.ndarray] = []
"""Held to the process's end, since pinned memory must not be freed."""


class AsyncHostCopy:
    """A copy of a few numbers [n] to the host that runs beside the GPU's work."""

    patience: ClassVar[float] = math.inf
    """Seconds that a read waits. What the GPU waits for may be a rank that hangs."""

    def __init__(self, numbers_n: Tensor) -> None:
        self._numbers_n, self._copied = numbers_n, None
        if numbers_n.is_cuda:
            self._numbers_n = numbers_n.to("cpu", non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> list[float]:
        """Return the numbers, after waiting for what was queued before their copy.

        Raises:
            RuntimeError: as of ``wait_for``.
        """
        if self._copied is not None:
            wait_for(self._copied, self.patience)
        return self._numbers_n.tolist()


def wait_for(event: torch.cuda.Event, seconds: float) -> None:
    """Wait until a GPU has come to an event.

    The event's own ``synchronize`` knows no timeout, and where a rank hangs NCCL's watchdog ends this process without
    an exception.

    Raises:
        RuntimeError: it timed out.
    """
    deadline = time.monotonic() + seconds
    while not event.query():
        if time.monotonic() > deadline:
            raise RuntimeError(f"timed out: the GPU's work was not done after {seconds:g} s")
        time.sleep(POLL_SECONDS)


class DeviceUploader:
    """Copies tensors to a device: ``images = DeviceUploader(device)(batch.images_b)``."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copying: deque[tuple[torch.cuda.Event, Tensor]] = deque()

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the tensor on the device, for which only the current stream waits.

        The caller may drop the tensor at once. It is held here until it is copied, because its memory is reused when
        nobody holds it (see ``Decoder``).
        """
        if self._stream is None or tensor.device == self.device:
            return tensor.to(self.device)
        while self._copying and self._copying[0][0].query():
            self._copying.popleft()
        pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
        # On a stream of its own, the copy does not queue behind the steps that the GPU has yet to take.
        with torch.cuda.stream(self._stream):
            there = pinned.to(self.device, non_blocking=True)
            copied = self._stream.record_event()
        using = torch.cuda.current_stream(self.device)
        using.wait_event(copied)
        there.record_stream(using)  # its memory belongs to the copying stream, which knows nothing of its use
        self._copying.append((copied, pinned))
        return there


def pin(memory: np.ndarray) -> None:
    """Pin allocated memory; ``unpin`` it before it is freed.

    Raises:
        RuntimeError: the driver refuses, or there is none.
    """
    try:
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, 0)))
    except RuntimeError:
        # The CUDA runtime keeps its latest error and would blame the next kernel for it, so a kernel clears it.
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device="cuda")
        raise


def unpin(memory: np.ndarray) -> None:
    """Undo ``pin``, once all copies from there are done.

    The driver may wait for what is queued on the GPU, which does not end where a rank hangs. Memory then stays pinned.
    """
    idle = False
    with contextlib.suppress(RuntimeError):  # an earlier kernel failed
        idle = torch.cuda.current_stream().query()
    if idle:
        torch.cuda.cudart().cudaHostUnregister(memory.ctypes.data)
    else:
        _STILL_PINNED.append(memory)
