"""The ranks of a command, and errors that all of them meet alike.

Imports nothing heavy.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

from dist_obdsd.errors import UserError

if TYPE_CHECKING:
    from dist_obdsd.config import Config
    from dist_obdsd.distributed.launch import Runtime

C = TypeVar("C", bound="Config | None")


def env_rank() -> str:
    """Return this process's rank by the launcher's environment."""
    return os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"


@contextmanager
def joined(read: Callable[[], C]) -> "Iterator[tuple[C, Runtime]]":
    """Read a config, and join the process group that it asks for.

    Where one rank alone cannot read what it needs, all fail: the others would wait for it.
    """
    config, failure = None, None
    try:
        config = read()
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
        yield cast("C", config), rank
