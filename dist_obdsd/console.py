"""Logging, progress bars and colours on the terminal.

The package logs at four levels. DEBUG: details, which rank 0 shows with ``--verbose``. INFO: news that every rank
knows; rank 0 shows it. NOTICE: results and the like, which nobody may miss; rank 0 shows them, also with ``--quiet``.
WARNING: what this rank alone met; every rank shows it, on standard error.
"""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any, TextIO

logger = logging.getLogger(__name__)
NOTICE = 25
LINE_SECONDS = 10.0  # between two lines of progress where there are no bars
COLOURS = {"red": "31", "green": "32", "yellow": "33"}


class TerminalHandler(logging.Handler):
    """Handler that prints above the progress bars, warnings on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if record.levelno >= logging.WARNING:
                print_line(f"{paint('dist-obdsd:', 'yellow', sys.stderr)} {record.getMessage()}", sys.stderr)
            else:
                print_line(record.getMessage(), sys.stdout)
        except BrokenPipeError:
            raise  # whoever reads our output has enough; the program ends
        except Exception:
            self.handleError(record)


@contextmanager
def log_to_terminal(is_main: bool = True, quiet: bool = False, verbose: bool = False) -> Iterator[None]:
    """Show the package's log records while the block runs; for programs.

    Ranks that are not ``is_main`` show warnings only.
    """
    logger, handler = logging.getLogger("dist_obdsd"), TerminalHandler()
    before = logger.level, logger.propagate
    level = NOTICE if quiet else logging.DEBUG if verbose else logging.INFO
    logger.setLevel(level if is_main else logging.WARNING)
    logger.propagate = False  # a handler that MLflow or DeepSpeed put on the root logger would print it again
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def bar(total: int, unit: str, doing: str, **options: Any) -> Any:
    """Return a context with ``update(n)``: a bar on a terminal, else some lines."""
    if not has_bars():
        return _lines(total, unit, doing)
    return _tqdm()(total=total, unit=f" {unit}", desc=doing, leave=False, dynamic_ncols=True, **options)


@contextmanager
def _lines(total: int, unit: str, doing: str) -> Iterator[SimpleNamespace]:
    done, told = 0, time.monotonic()

    def update(n: int) -> None:
        nonlocal done, told
        done += n
        if time.monotonic() - told >= LINE_SECONDS:
            told = time.monotonic()
            logger.info("%s: %s of %s %s", doing, f"{done:,}", f"{total:,}", unit)

    yield SimpleNamespace(update=update)


def print_line(text: str, file: TextIO) -> None:
    """Print a line above the bars that are there."""
    tqdm = _tqdm()
    write = print if tqdm is None else tqdm.write
    write(text, file=file)
    file.flush()


def has_bars() -> bool:
    """Tell if standard error is a terminal of known size, and tqdm is installed."""
    if not sys.stderr.isatty() or _tqdm() is None:
        return False
    with suppress(OSError):
        return os.get_terminal_size(sys.stderr.fileno()).lines > 0  # without, tqdm shows nothing
    return True


def _tqdm() -> Any:
    try:
        from tqdm import tqdm
    except ImportError:  # training and measuring do without
        return None
    return tqdm


def paint(text: str, colour: str, file: TextIO) -> str:
    """Colour a text on a terminal that shows colours; the user may set NO_COLOR."""
    shows = file.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return f"\x1b[{COLOURS[colour]}m{text}\x1b[0m" if shows else text
