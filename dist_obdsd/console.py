"""Progress bars and colours on a terminal, and nothing of them where the output is a file or a pipe."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TextIO

COLOURS = {"red": "31", "green": "32", "yellow": "33"}


NOTICE = 25
"""Log level of what every rank knows and nobody may miss, such as a result: rank 0 shows it, also with ``--quiet``.

The package logs at three levels. INFO: news that every rank knows, shown by rank 0. NOTICE: as above. WARNING: what
this rank alone has met, shown by every rank on standard error.
"""


class TerminalHandler(logging.Handler):
    """Prints log records above the progress bars: plain on standard output, from WARNING on on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if record.levelno >= logging.WARNING:
                say(f"{paint('dist-obdsd:', 'yellow', sys.stderr)} {record.getMessage()}", sys.stderr)
            else:
                say(record.getMessage(), sys.stdout)
        except BrokenPipeError:
            raise  # whoever reads our output has enough; the program ends
        except Exception:
            self.handleError(record)


@contextmanager
def log_to_terminal(is_main: bool = True, quiet: bool = False) -> Iterator[None]:
    """Show the package's log records on the terminal while the block runs; only the program does this, no library call.

    Args:
        is_main: whether this is rank 0; the other ranks show warnings only.
        quiet: leave out INFO.
    """
    logger, handler = logging.getLogger("dist_obdsd"), TerminalHandler()
    before = logger.level, logger.propagate
    logger.setLevel(logging.WARNING if not is_main else NOTICE if quiet else logging.INFO)
    logger.propagate = False  # a handler that MLflow or DeepSpeed put on the root logger would print it again
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def bar(total: int, unit: str, doing: str, **options: Any) -> Any:
    """A context with ``update(n)``: a bar on a terminal, else a bar that prints nothing. ``options`` are tqdm's."""
    tqdm = _tqdm()
    if tqdm is None:
        return _NoBar()
    return tqdm(total=total, unit=f" {unit}", desc=doing, disable=None, leave=False, dynamic_ncols=True, **options)


def say(text: str, file: TextIO | None = None) -> None:
    """Print a line, above the bars that are there; to standard error if no file is given."""
    tqdm = _tqdm()
    if tqdm is None:
        print(text, file=file or sys.stderr)
    else:
        tqdm.write(text, file=file or sys.stderr)
    (file or sys.stderr).flush()


def has_bars() -> bool:
    """Whether bars can be shown: standard error is a terminal, and tqdm is installed."""
    return sys.stderr.isatty() and _tqdm() is not None


def _tqdm() -> Any:
    """The class, or None where tqdm is not installed: what trains and measures does without it."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm


class _NoBar(AbstractContextManager[Any]):
    def __exit__(self, *error: object) -> None: ...

    def update(self, n: int) -> None: ...


def coloured(file: TextIO) -> bool:
    """Whether colours may be written there: a terminal that has them, whose user did not set NO_COLOR."""
    return file.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, colour: str, file: TextIO) -> str:
    """The text in a colour where ``file`` shows colours, else as it is."""
    return f"\x1b[{COLOURS[colour]}m{text}\x1b[0m" if coloured(file) else text


def rate(images: int, size: int, seconds: float) -> str:
    """How quickly ``images`` with ``size`` bytes were dealt with."""
    return f"{seconds:.1f} s, {images / seconds:,.0f} images/s, {size / seconds / 1e6:.1f} MB/s"
