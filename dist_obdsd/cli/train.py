"""``dist-obdsd train``."""

import argparse
import logging
import os
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from dist_obdsd import console
from dist_obdsd.cli.output import show, table
from dist_obdsd.cli.ranks import joined
from dist_obdsd.errors import InputError
from dist_obdsd.machine import start_collecting
from dist_obdsd.training.preemption import PreemptionHandler

if TYPE_CHECKING:
    from dist_obdsd.config import Config

logger = logging.getLogger(__name__)


def train(options: argparse.Namespace) -> int:
    """Train and evaluate what a config describes."""

    def read() -> "Config":
        from dist_obdsd.config import load_config

        for name in ("TORCHELASTIC_MAX_RESTARTS", "SLURM_RESTART_COUNT"):
            if options.fresh and (times := os.environ.get(name, "0")) != "0":
                raise InputError(f"--fresh would begin anew at every restart ({name}={times}); set a new name instead")
        return load_config(options.config, options.overrides)

    with PreemptionHandler().installed() as stop, joined(read) as (given, rank):
        # After the signals' handlers, since these take seconds.
        from dist_obdsd.distributed.collectives import broadcast_object
        from dist_obdsd.distributed.launch import restart_trap
        from dist_obdsd.models.embedder import with_fallback
        from dist_obdsd.training.progress_display import build_display
        from dist_obdsd.training.run_dir import free_name
        from dist_obdsd.training.trainer import Trainer

        start_collecting()
        if (trap := restart_trap(os.environ)) is not None:
            show(trap)
        fresh = free_name(Path(given.output), given.name) if options.fresh else None
        config = with_fallback(given.model_copy(update={"name": broadcast_object(fresh) or given.name}))
        where = f"{rank.world_size} x {rank.device.type} ({rank.launch.launcher})"
        logger.info(f"{config.run_dir}: {where}, {config.precision}")
        every, size = config.tracking.every_steps, config.batch.global_size
        with closing(build_display(rank.is_main, every, size, options.quiet, options.verbose)) as display:
            summary = Trainer(config, rank, stop, display).run()
        if summary["rows"]:
            show(("" if options.quiet else "\n") + table(summary["rows"]))
        state = summary["meta"]["state"]
        colour = "green" if state == "finished" else "yellow"
        logger.info(f"\n{console.paint(state, colour, sys.stdout)}: {config.run_dir}")
        if config.tracking.kind == "mlflow":
            uri = config.tracking.uri
            curves = uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {uri}"
            logger.info(f"to see its curves: {curves}")
        if state == "finished":
            return 0
        # Launchers kill the others when one rank ends with an error, so all end together. And torchrun starts again
        # what ends with one, which is not for a run that somebody stopped.
        stopped = broadcast_object(stop.by_file)
        return 0 if stopped and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" else os.EX_TEMPFAIL
