"""Preemption, as clusters announce it: SIGTERM or SIGUSR1. Imports nothing heavy, so it can be installed early."""

import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from dist_obdsd.errors import StoppedError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
T = TypeVar("T")


class PreemptionHandler:
    """Remembers whether this process was asked to stop. The ranks tell each other in the steps' own all-reduce."""

    def __init__(self) -> None:
        self._asked_at: float | None = None

    @property
    def requested(self) -> bool:
        return self._asked_at is not None

    @property
    def seconds_ago(self) -> float | None:
        """Seconds since the first signal; None on a rank that had none."""
        return None if self._asked_at is None else time.monotonic() - self._asked_at

    @contextmanager
    def installed(self) -> Iterator["PreemptionHandler"]:
        """Note the signals instead of dying of them, while the block runs."""

        def ask(number: int, frame: Any) -> None:
            self._asked_at = self._asked_at or time.monotonic()

        previous = {number: signal.signal(number, ask) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def check(self) -> None:
        """Raise ``StoppedError`` if this process was asked to stop."""
        if self.requested:
            raise StoppedError("a signal asked this process to stop")

    def between(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, with a ``check`` before each and after the last."""
        for item in items:
            self.check()
            yield item
        self.check()
