"""When checkpoints are written inside an epoch, and writing them in the background."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from dist_obdsd import checkpoint
from dist_obdsd.config import CheckpointConfig


class Saver:
    """Of the one rank that writes. The others ask only ``due``."""

    def __init__(self, config: CheckpointConfig, folder: Path, report: Callable[[str, int, float], None]) -> None:
        """
        Args:
            report: is told of every file: its name, its size in bytes and how long training waited for it, in seconds.
        """
        self._settings, self._folder, self._report = config, folder, report
        self._last = time.monotonic()
        self._thread: ThreadPoolExecutor | None = None
        self._pending: tuple[Future[Path], float] | None = None

    def due(self, global_step: int) -> bool:
        """Whether a checkpoint belongs after so many optimizer steps; the same on every rank."""
        every = self._settings.every_steps
        return every is not None and global_step % every == 0

    def overdue(self) -> bool:
        """Whether the last checkpoint is too long ago, or could not be written in the background, which ``save`` will
        say. The clock's answer, so one rank's counts for all."""
        if self._pending is not None and self._pending[0].done() and self._pending[0].exception() is not None:
            return True
        minutes = self._settings.every_minutes
        return minutes is not None and time.monotonic() - self._last > 60 * minutes

    def save(self, state: dict[str, Any], best: bool) -> None:
        """Write a checkpoint, or hand it to the thread that does.

        Raises:
            RunError: the disk is full or the folder cannot be written, now or, in the background, the time before.
        """
        self.wait()
        started = time.perf_counter()
        self._last = time.monotonic()
        if not self._settings.background:
            self._tell(self._write(state, best), time.perf_counter() - started)
            return
        self._thread = self._thread or ThreadPoolExecutor(1, "saving")
        state = _copied(state)
        self._pending = self._thread.submit(self._write, state, best), time.perf_counter() - started

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            RunError: what was being written could not be.
        """
        if self._pending is not None:
            (future, seconds), self._pending = self._pending, None
            self._tell(future.result(), seconds)

    def close(self) -> None:
        """Let a file that is being written become whole, also where the run ends early. What it says is not heard."""
        if self._thread is not None:
            self._thread.shutdown()

    def _write(self, state: dict[str, Any], best: bool) -> Path:
        return checkpoint.save(self._folder, state, best=best, keep=self._settings.keep)

    def _tell(self, path: Path, seconds: float) -> None:
        self._report(path.name, path.stat().st_size, seconds)


def _copied(value: Any) -> Any:
    """Plain containers with every tensor copied to the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(entry) for entry in value)
    return value
