"""``dist-obdsd train`` and ``status``."""

import argparse
import logging
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from dist_obdsd import console
from dist_obdsd.cli.output import show, table
from dist_obdsd.cli.ranks import joined
from dist_obdsd.errors import InputError
from dist_obdsd.training.preemption import STOP_FILE, PreemptionHandler

if TYPE_CHECKING:
    from dist_obdsd.config import Config
    from dist_obdsd.distributed.launch import Runtime

logger = logging.getLogger(__name__)


def train(options: argparse.Namespace) -> int:
    """Train and evaluate what a config describes."""
    with PreemptionHandler().installed() as stop, joined(options) as (config, rank):  # signals first: imports take long
        assert config is not None
        return _train(rank, config, stop, options)


def _train(rank: "Runtime", config: "Config", stop: PreemptionHandler, options: argparse.Namespace) -> int:
    from dist_obdsd.distributed.collectives import broadcast_object
    from dist_obdsd.distributed.launch import restart_trap
    from dist_obdsd.models.embedder import with_fallback
    from dist_obdsd.training.progress_display import build_display
    from dist_obdsd.training.run_dir import free_name
    from dist_obdsd.training.trainer import Trainer

    if (trap := restart_trap(os.environ)) is not None:
        show(trap)
    config = with_fallback(config)
    fresh = free_name(Path(config.output), config.name) if options.fresh else None
    if (name := broadcast_object(fresh)) is not None:
        config = config.model_copy(update={"name": name})
    where = f"{rank.world_size} x {rank.device.type} ({rank.launch.launcher})"
    logger.info(f"{config.run_dir}: {where}, {config.precision}")
    every, size = config.tracking.every_steps, config.batch.global_size
    with build_display(rank.is_main, every, size, options.quiet, options.verbose) as display:
        summary = Trainer(config, rank, stop, display).run()
    if summary["rows"]:
        show(("" if options.quiet else "\n") + table(summary["rows"]))
    state = summary["meta"]["state"]
    logger.info(f"\n{console.paint(state, 'green' if state == 'finished' else 'yellow', sys.stdout)}: {config.run_dir}")
    if config.tracking.kind == "mlflow":
        uri = config.tracking.uri
        logger.info(f"to see its curves: {uri if uri.startswith('http') else f'mlflow ui --backend-store-uri {uri}'}")
    if state == "finished":
        return 0
    broadcast_object(None)  # launchers kill the others when one rank ends with an error, so all end together
    return os.EX_TEMPFAIL


def status(options: argparse.Namespace) -> int:
    """Print a run's state, for scripts."""
    from dist_obdsd.config import load_config
    from dist_obdsd.training.run_dir import read_status

    found = read_status(load_config(options.config, options.overrides).run_dir)
    if options.since and datetime.fromisoformat(found.get("time", "1970-01-01")).timestamp() < options.since:
        found = {}
    print(found.get("state", "none"))
    if found.get("message"):
        print(found["message"], file=sys.stderr)
    return 0


def stop(options: argparse.Namespace) -> int:
    """Ask a run to stop in good order, from any machine that sees its folder.

    Raises:
        InputError: there is no such folder.
    """
    from dist_obdsd.config import load_config

    folder = load_config(options.config, options.overrides).run_dir
    try:
        (folder / STOP_FILE).touch()
    except OSError as error:
        raise InputError(
            f"cannot write {folder}/{STOP_FILE}: {error.strerror}; give the run's config and overrides"
        ) from error
    return 0
