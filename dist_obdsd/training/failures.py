"""Failing runs: an error that says where, and a status that says why."""

import contextlib
import logging
import platform
import traceback
from collections.abc import Iterator

from dist_obdsd.config import Config
from dist_obdsd.config.registry import plug_in_failure
from dist_obdsd.distributed.failures import is_timeout, unresponsive_ranks
from dist_obdsd.errors import RunError, UserError, format_error, is_lost_peer
from dist_obdsd.training.run_dir import Attempt
from dist_obdsd.training.train_step import TrainProgress

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def report_failure(config: Config, attempt: Attempt, rank: int, progress: TrainProgress) -> Iterator[None]:
    """Give a block's error its rank, host and step, and write it into the status.

    Raises:
        RunError: instead of a collective's timeout, with the ranks that hang, and of a lost connection.
    """
    try:
        yield
    except Exception as error:
        here = f"rank {rank} on {platform.node()} at step {progress.global_step}"
        failure = _explained(error, config)
        if isinstance(failure, UserError):
            failure.where = here
        else:
            failure.add_note(here)
        # The first rank to fail has the cause; the others only notice that it is gone.
        attempt.write_failure(f"{here}: {format_error(failure)}")
        raise failure from (None if failure is error else error)


def _explained(error: Exception, config: Config) -> Exception:
    """The error itself, unless another rank or the user's own code is to blame."""
    if is_timeout(error):
        missing = unresponsive_ranks()
        who = f"rank {', '.join(map(str, missing))}" if missing else "another rank"
        return RunError(
            f"{who} did not answer within timeout_seconds={config.timeout_seconds:g} and hangs or cannot be "
            f"reached; look at what it does there (py-spy dump), or raise timeout_seconds if it is only slow"
        )
    if is_lost_peer(error):
        return RunError(
            "the connection to another rank is lost; that rank or its launcher says why, and the same command goes on "
            "from the last checkpoint"
        )
    plug_ins = {
        "ranking.name": config.ranking.name,
        "distillation.target": config.distillation.target,
        "model.backbone": config.model.backbone,
    }
    if not isinstance(error, UserError) and (failure := plug_in_failure(error, plug_ins)):
        logger.debug("".join(traceback.format_exception(error)))
        return failure
    return error
