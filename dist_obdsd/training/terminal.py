"""What a rank shows of its run on the terminal."""

import datetime
import sys
from collections import deque
from typing import Any, Self

from dist_obdsd import console as progress

LOSSES = ("ranking", "distillation")
RECENT = 20
"""Steps that rates are a mean over."""


class Terminal:
    """Of a rank that is not to speak: all that it shows is what it alone has met."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def say(self, text: str) -> None:
        """News that all ranks know."""

    def tell(self, text: str) -> None:
        """What all ranks know and nobody may miss: a warning, a result."""

    def warn(self, text: str) -> None:
        """Print what this rank alone has met."""
        print(f"{progress.paint('dist-obdsd:', 'yellow', sys.stderr)} {text}", file=sys.stderr, flush=True)

    def begin(self, title: str, done: int, steps: int, left: int) -> None:
        """Steps begin: ``done`` of the epoch's ``steps`` were taken before, ``left`` are left in the whole run."""

    def step(self, step: int, about: dict[str, float], values: dict[str, float]) -> None:
        """A step's numbers have arrived: ``about`` has its "seconds" and "data_wait", ``values`` its losses."""

    def end(self) -> None:
        """No more steps for now."""


class Lines(Terminal):
    """Of rank 0, where the output is a file or a pipe: a line each so many steps."""

    def __init__(self, every: int, quiet: bool = False) -> None:
        self._every, self._quiet = every, quiet

    def say(self, text: str) -> None:
        if not self._quiet:
            self.tell(text)

    def tell(self, text: str) -> None:
        print(text, flush=True)

    def step(self, step: int, about: dict[str, float], values: dict[str, float]) -> None:
        if self._every and step % self._every == 0:
            self.say(f"  step {step}: {_losses(values)}")


class Bar(Lines):
    """Of rank 0 on a terminal: a bar for the epoch; lines are printed above it."""

    def __init__(self, every: int, global_size: int) -> None:
        """
        Args:
            every: steps between two lines; 0 for none.
            global_size: images in a step.
        """
        super().__init__(every)
        self._global_size = global_size
        self._bar: Any = None
        self._left = 0
        self._recent: deque[tuple[float, float]] = deque(maxlen=RECENT)

    def tell(self, text: str) -> None:
        progress.say(text, sys.stdout)
        sys.stdout.flush()

    def warn(self, text: str) -> None:
        progress.say(f"{progress.paint('dist-obdsd:', 'yellow', sys.stderr)} {text}")

    def begin(self, title: str, done: int, steps: int, left: int) -> None:
        self.end()
        form = "{desc} {percentage:3.0f}% |{bar:16}| {n_fmt}/{total_fmt} steps, {elapsed}<{remaining}{postfix}"
        colour = "green" if progress.coloured(sys.stderr) else None
        self._bar = progress.bar(steps, "steps", title, initial=done, bar_format=form, colour=colour)
        self._left = left

    def step(self, step: int, about: dict[str, float], values: dict[str, float]) -> None:
        super().step(step, about, values)
        if self._bar is None:
            return
        self._left -= 1
        self._recent.append((about["seconds"], about["data_wait"]))
        seconds, waited = (sum(column) for column in zip(*self._recent, strict=True))
        speed = self._global_size * len(self._recent) / seconds
        left = datetime.timedelta(seconds=round(self._left * seconds / len(self._recent)))
        text = f"{speed:,.0f} images/s, {waited / seconds:.0%} data wait, run {left} left, {_losses(values)}"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update()

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _losses(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {values[name]:.4f}" for name in LOSSES if name in values)


def build_terminal(is_main: bool, every: int, global_size: int, quiet: bool, verbose: bool) -> Terminal:
    """What fits a rank: nothing, a bar on a terminal, else lines.

    Args:
        every: steps between two lines where there is no bar.
        quiet: warnings and the final table only.
        verbose: a line for every step, also above a bar.
    """
    if not is_main:
        return Terminal()
    if quiet:
        return Lines(0, quiet=True)
    if progress.has_bars():
        return Bar(1 if verbose else 0, global_size)
    return Lines(1 if verbose else every)
