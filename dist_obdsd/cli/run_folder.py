"""``dist-obdsd figures`` and ``replay``: work on a run folder that is there."""

import argparse
import logging

from dist_obdsd.cli.output import show

logger = logging.getLogger(__name__)


def figures(options: argparse.Namespace) -> int:
    """Draw a run's figures and write its report anew."""
    from dist_obdsd.figures.run_figures import draw

    paths, failures = draw(options.run_dir, options.overrides)
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
