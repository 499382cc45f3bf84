"""The ranks of a command, and errors that all of them meet alike.

Imports nothing heavy.
"""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dist_obdsd.errors import UserError

if TYPE_CHECKING:
    from dist_obdsd.config import Config
    from dist_obdsd.distributed.launch import Runtime


def env_rank() -> str:
    """Return this process's rank by the launcher's environment."""
    return os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"


@contextmanager
def on_every_rank() -> Iterator[None]:
    """Mark an error before there is a group as one of all ranks: rank 0 prints it."""
    try:
        yield
    except UserError as error:
        error.on_all_ranks = True
        raise


@contextmanager
def joined(options: argparse.Namespace) -> "Iterator[tuple[Config | None, Runtime]]":
    """Load the config, if one is given, and join the process group that it asks for.

    Where one rank alone cannot read its config, all fail: the others would wait for it.
    """
    config, failure = None, None
    try:
        if options.config is not None:
            from dist_obdsd.config import load_config

            config = load_config(options.config, options.overrides)
    except UserError as error:
        if not os.environ.keys() & {"RANK", "SLURM_STEP_ID"}:
            raise  # no launcher, so there are no other ranks: at once, without importing torch
        failure = error
    from dist_obdsd.distributed import launch
    from dist_obdsd.distributed.failures import raise_on_all_ranks

    group: tuple[Any, ...] = ()
    if config is not None:
        group = (config.device, config.threads, config.timeout_seconds, config.strategy in ("deepspeed", "fsdp"))
    with launch.start(*group) as rank:
        with raise_on_all_ranks("reading the config"):
            if failure is not None:
                raise failure
        yield config, rank
