"""Progress bars on a terminal, and nothing where standard error is a file or a pipe."""

import sys
from typing import Any


def bar(total: int, unit: str, doing: str) -> Any:
    """A context with ``update(n)``: a bar on a terminal, else a bar that prints nothing."""
    from tqdm import tqdm

    return tqdm(total=total, unit=f" {unit}", desc=doing, disable=None, leave=False, dynamic_ncols=True)


def say(text: str) -> None:
    """Print a line to standard error, above the bars that are there."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


def rate(images: int, size: int, seconds: float) -> str:
    """How quickly ``images`` with ``size`` bytes were dealt with."""
    return f"{seconds:.1f} s, {images / seconds:,.0f} images/s, {size / seconds / 1e6:.1f} MB/s"
