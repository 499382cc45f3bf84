"""Preemption, as clusters announce it: SIGTERM or SIGUSR1. Imports nothing heavy, so it can be installed early."""

import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from dist_obdsd.errors import StoppedError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
T = TypeVar("T")


class PreemptionHandler:
    """Remembers whether this process was asked to stop. The ranks tell each other in the steps' own all-reduce."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def installed(self) -> Iterator["PreemptionHandler"]:
        """Note the signals instead of dying of them, while the block runs."""

        def ask(number: int, frame: Any) -> None:
            self.requested = True

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
