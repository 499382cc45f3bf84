"""``dist-obdsd status``, ``stop``, ``figures`` and ``replay``: a run's folder."""

import argparse
import logging
import sys
from datetime import datetime
from pathlib import Path

from dist_obdsd.cli.output import show
from dist_obdsd.config import load_config
from dist_obdsd.errors import InputError
from dist_obdsd.training.preemption import STOP_FILE
from dist_obdsd.training.run_dir import read_status

logger = logging.getLogger(__name__)


def _run_dir(options: argparse.Namespace) -> Path:
    """The run folder that was given, or that of the config."""
    given: Path = options.config
    return given if (given / "status.json").is_file() else load_config(given, options.overrides).run_dir


def status(options: argparse.Namespace) -> int:
    """Print a run's state, for scripts."""
    found = read_status(_run_dir(options))
    if options.since and datetime.fromisoformat(found.get("time", "1970-01-01")).timestamp() < options.since:
        found = {}
    print(found.get("state", "none"))
    if found.get("message"):
        print(found["message"], file=sys.stderr)
    return 0


def stop(options: argparse.Namespace) -> int:
    """Ask a run to stop in good order, from any machine that sees its folder."""
    file = _run_dir(options) / STOP_FILE
    try:
        file.touch()
    except OSError as error:
        raise InputError(f"cannot write {file}: {error.strerror}; give the run's config and overrides") from error
    return 0


def figures(options: argparse.Namespace) -> int:
    """Draw a run's figures anew."""
    from dist_obdsd.figures.run_figures import draw

    paths, failures = draw(options.run_dir, options.overrides)
    if not paths and not failures:
        raise InputError(f"{options.run_dir} has nothing to draw from; train an epoch with tracking.figures=true")
    for path in paths:
        show(str(path))
    for failure in failures:
        logger.warning(failure)
    return 1 if failures else 0


def replay(options: argparse.Namespace) -> int:
    """Send a tracking server the part of a run that it missed."""
    from dist_obdsd.tracking.uploader import replay

    replay(options.run_dir, options.uri, options.new_run)
    return 0
