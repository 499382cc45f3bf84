"""Steps of a run on the terminal: a bar, lines, both, or nothing."""

import datetime
import logging
from collections import deque
from collections.abc import Mapping
from typing import Any

from dist_obdsd import console

logger = logging.getLogger(__name__)
LOSSES = ("ranking", "distillation")
RECENT = 20
"""Steps that rates are a mean over."""
ROOM = " |###| 1234/1234, "
"""Of a line of the bar, the part that no words can leave."""


def format_losses(losses: Mapping[str, float]) -> str:
    """Format the terms of the loss for a line of text."""
    return ", ".join(f"{name} {value:.4f}" for name, value in losses.items())


class ProgressDisplay:
    """Shows the steps of the epochs; as built by default, it shows nothing."""

    def __init__(self, every: int = 0, bar_size: int = 0) -> None:
        """Show a line every so many steps, a bar for steps of so many images; or not."""
        self.every, self.bar_size = every, bar_size
        self._bar: Any = None
        self._recent: deque[tuple[float, float]] = deque(maxlen=RECENT)

    def begin(self, title: str, done: int, steps: int, left: int) -> None:
        """Begin an epoch of ``steps``, ``done`` of them taken, ``left`` in the whole run."""
        self._left = left
        if self.bar_size:
            form = "{desc} |{bar}| {n_fmt}/{total_fmt}{postfix}"
            self._bar = console.bar(steps, "steps", title, initial=done, bar_format=form)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Show a step by its numbers: losses, "seconds" and "data_wait" among them."""
        losses = {name: values[name] for name in LOSSES if name in values}
        if self.every and step % self.every == 0:
            logger.info("  step %d: %s", step, format_losses(losses))
        if self._bar is not None:
            self._left -= 1
            self._recent.append((values["seconds"], values["data_wait"]))
            seconds, waited = (sum(column) for column in zip(*self._recent, strict=True))
            speed = self.bar_size * len(self._recent) / seconds
            left = datetime.timedelta(seconds=round(self._left * seconds / len(self._recent)))
            text = f"{speed:,.0f} images/s, {waited / seconds:.0%} data wait, {left} left, {format_losses(losses)}"
            if len(text) + len(self._bar.desc) + len(ROOM) > (self._bar.format_dict["ncols"] or len(text)):
                numbers = " + ".join(f"{value:.4g}" for value in losses.values())
                text = f"{speed:,.0f}/s, wait {waited / seconds:.0%}, {left} left, {numbers}"
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()

    def close(self) -> None:
        """Draw the bar's last step, however quick it was, and take the bar away."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
            self._bar = None


def build_display(is_main: bool, every: int, global_size: int, quiet: bool, verbose: bool) -> ProgressDisplay:
    """Choose the display of a rank: nothing, a bar on a terminal, else some lines.

    ``verbose`` shows a line for every step, also above a bar.
    """
    if not is_main or quiet:
        return ProgressDisplay()
    if console.has_bars():
        return ProgressDisplay(1 if verbose else 0, global_size)
    return ProgressDisplay(1 if verbose else every)
