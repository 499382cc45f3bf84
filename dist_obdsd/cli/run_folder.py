"""``dist-obdsd figures`` and ``replay``: work on a run folder that is there."""

import argparse
import logging

from dist_obdsd.cli.output import show

logger = logging.getLogger(__name__)


def figures(options: argparse.Namespace) -> int:
    """Draw a run's figures anew."""
    from dist_obdsd.figures.run_figures import draw

    failed: list[str] = []
    for path in draw(options.run_dir, failed.append, options.overrides):
        show(str(path))
    for reason in failed:
        logger.warning(reason)
    return 1 if failed else 0


def replay(options: argparse.Namespace) -> int:
    """Send a tracking server the part of a run that it missed."""
    from dist_obdsd.tracking.uploader import replay

    replay(options.run_dir, options.uri, options.new_run)
    return 0
