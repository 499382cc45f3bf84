"""The steps of a run on the terminal: a bar, a line every so many steps where there is no terminal, or nothing."""

import datetime
import logging
import sys
from collections import deque
from collections.abc import Mapping
from typing import Any, Self

from dist_obdsd import console

logger = logging.getLogger(__name__)
LOSSES = ("ranking", "distillation")
RECENT = 20
"""Steps that rates are a mean over."""


class ProgressDisplay:
    """The null display, which shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def begin(self, title: str, done: int, steps: int, left: int) -> None:
        """Steps begin: ``done`` of the epoch's ``steps`` were taken before, ``left`` are left in the whole run."""

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """A step's numbers have arrived, with its losses, "seconds" and "data_wait" among them."""

    def end(self) -> None:
        """No more steps for now."""


class StepLines(ProgressDisplay):
    """A line every ``every`` steps; none at all if that is 0."""

    def __init__(self, every: int) -> None:
        self._every = every

    def step(self, step: int, values: Mapping[str, float]) -> None:
        if self._every and step % self._every == 0:
            logger.info("  step %d: %s", step, _losses(values))


class StepBar(StepLines):
    """A bar for each epoch, with the speed and the time that the run has left."""

    def __init__(self, every: int, global_size: int) -> None:
        """
        Args:
            every: steps between two lines above the bar; 0 for none.
            global_size: images in a step.
        """
        super().__init__(every)
        self._global_size, self._left = global_size, 0
        self._bar: Any = None
        self._recent: deque[tuple[float, float]] = deque(maxlen=RECENT)

    def begin(self, title: str, done: int, steps: int, left: int) -> None:
        self.end()
        form = "{desc} {percentage:3.0f}% |{bar:16}| {n_fmt}/{total_fmt} steps, {elapsed}<{remaining}{postfix}"
        colour = "green" if console.coloured(sys.stderr) else None
        self._bar = console.bar(steps, "steps", title, initial=done, bar_format=form, colour=colour)
        self._left = left

    def step(self, step: int, values: Mapping[str, float]) -> None:
        super().step(step, values)
        self._left -= 1
        self._recent.append((values["seconds"], values["data_wait"]))
        seconds, waited = (sum(column) for column in zip(*self._recent, strict=True))
        speed = self._global_size * len(self._recent) / seconds
        left = datetime.timedelta(seconds=round(self._left * seconds / len(self._recent)))
        text = f"{speed:,.0f} images/s, {waited / seconds:.0%} data wait, run {left} left, {_losses(values)}"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update()

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _losses(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {values[name]:.4f}" for name in LOSSES if name in values)


def build_display(is_main: bool, every: int, global_size: int, quiet: bool, verbose: bool) -> ProgressDisplay:
    """Choose the display of a rank: nothing, a bar on a terminal, else lines.

    Args:
        every: steps between two lines where there is no bar.
        verbose: show a line for every step, also above a bar.
    """
    if not is_main or quiet:
        return ProgressDisplay()
    if console.has_bars():
        return StepBar(1 if verbose else 0, global_size)
    return StepLines(1 if verbose else every)
