"""Failures that all ranks meet together, so that no rank waits for one that has left."""

import hashlib
import json
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from dist_obdsd.distributed.collectives import gather_json, on_every_rank, rank, world_size
from dist_obdsd.errors import InputError, RunError, StoppedError, UserError, format_error


def assert_same_config(config: Mapping[str, Any]) -> None:
    """Check that every rank was started with the same settings.

    Args:
        config: by name, anything JSON can hold.

    Raises:
        InputError: on every rank, with the names that differ, their values and the ranks that have them.
    """
    if len(set(gather_json(hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()))) == 1:
        return
    differences = []
    found = gather_json(dict(config))
    for name in sorted(set().union(*found)):
        holders: dict[str, list[int]] = {}
        for number, theirs in enumerate(found):
            holders.setdefault(json.dumps(theirs[name]) if name in theirs else "not set", []).append(number)
        if len(holders) > 1:
            differences.append(f"{name} is " + ", ".join(f"{value} on {_ranks(who)}" for value, who in holders.items()))
    message = f"the ranks were started with different settings ({'; '.join(differences)}); start all ranks alike"
    raise on_every_rank(InputError(message))


def _ranks(numbers: Sequence[int]) -> str:
    if len(numbers) > 8:
        return f"{len(numbers)} ranks"
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


TIMEOUTS = ("Timed out waiting", "timed out", "Wait timeout", "Watchdog caught collective operation timeout")


def is_timeout(error: BaseException) -> bool:
    """Whether a collective waited for another rank for too long."""
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in TIMEOUTS)


def unresponsive_ranks(seconds: float = 3.0) -> list[int]:
    """The ranks that did not find out about a timeout themselves: those that hang. Called by the others after one.

    Args:
        seconds: how long to wait for the others to report.
    """
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"timed out/{rank()}", "")
        deadline = time.monotonic() + seconds
        missing = list(range(world_size()))
        while missing and time.monotonic() < deadline:
            missing = [r for r in missing if not store.check([f"timed out/{r}"])]
            time.sleep(0.1)
    except (dist.DistError, RuntimeError):  # the store went down with its rank
        return []
    return missing


@contextmanager
def raise_on_all_ranks(what: str) -> Iterator[None]:
    """Run a block that may fail on some ranks, and let all ranks fail together if one does.

    The block must hold no collective itself: a rank that left it early would leave the others waiting there.

    Raises:
        InputError, RunError, StoppedError: on every rank, with the failing rank's number and message. A failure counts
            more than a wish to stop.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
        if not isinstance(error, UserError):
            traceback.print_exc()  # a defect, of which the other ranks learn only the last line
    kind = next((kind for kind in (InputError, StoppedError) if isinstance(failure, kind)), RunError)
    report = None if failure is None else {"kind": kind.__name__, "message": format_error(failure)}
    reports = gather_json(report)
    failed = {number: told for number, told in enumerate(reports) if told is not None}
    if not failed:
        return
    number, told = min(failed.items(), key=lambda item: item[1]["kind"] == "StoppedError")
    # A cause that all ranks met alike (a missing file, say) needs no rank in its message.
    alike = len(failed) == world_size() and len({r["message"] for r in failed.values()}) == 1
    message = told["message"] if alike else f"{what} failed on rank {number}: {told['message']}"
    kinds = {"InputError": InputError, "StoppedError": StoppedError}
    raise on_every_rank(kinds.get(told["kind"], RunError)(message)) from failure
