"""Requests to stop: SIGTERM, SIGUSR1, Ctrl-C, or the run folder's file ``stop``."""

import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from dist_obdsd.errors import StoppedError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STOP_FILE = "stop"
POLL_SECONDS = 1.0  # between looks for the stop file, which a network file system answers
T = TypeVar("T")


class PreemptionHandler:
    """Remembers if this process was asked to stop, for the steps' own all-reduce."""

    def __init__(self) -> None:
        self.reason = ""
        """The signal or the file that asked, or empty."""
        self.by_file = False
        self._file: Path | None = None
        self._looked = 0.0

    @contextmanager
    def installed(self) -> Iterator["PreemptionHandler"]:
        """Note signals instead of dying of them; a second Ctrl-C kills."""

        def ask(number: int, frame: Any) -> None:
            self.reason, self.by_file = signal.Signals(number).name, False
            if number == signal.SIGINT:
                signal.signal(number, signal.SIG_DFL)

        previous = {number: signal.signal(number, ask) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def watch(self, run_dir: Path) -> None:
        """Take a file ``stop`` in the run folder for a request, too."""
        self._file = run_dir / STOP_FILE

    @property
    def requested(self) -> bool:
        """True once this process was asked to stop."""
        if not self.reason and self._file is not None and time.monotonic() - self._looked >= POLL_SECONDS:
            self._looked = time.monotonic()
            if self._file.exists():
                self.reason, self.by_file = f"the file {self._file}", True
        return bool(self.reason)

    def check(self) -> None:
        """Raise ``StoppedError`` if this process was asked to stop."""
        if self.requested:
            raise StoppedError(f"{self.reason} asked this process to stop")

    def between(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, with a ``check`` before each and after the last."""
        for item in items:
            self.check()
            yield item
        self.check()
