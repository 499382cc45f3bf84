"""Failures that all ranks raise together, so that none waits for one that left."""

import json
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist

from dist_obdsd.distributed.collectives import gather_json, met_by_all, rank, values_by_rank, world_size
from dist_obdsd.errors import InputError, RunError, StoppedError, UserError, format_error


def assert_same_config(config: Mapping[str, Any]) -> None:
    """Check that every rank was launched with the same settings, by name.

    Raises:
        InputError: on every rank, with the names that differ, their values and the ranks that have them.
    """
    found, differences = gather_json(dict(config)), []
    for name in sorted(set().union(*found)):
        values = [json.dumps(theirs[name]) if name in theirs else "not set" for theirs in found]
        if len(set(values)) > 1:
            differences.append(f"{name} is {values_by_rank(values)}")
    if differences:
        different = "; ".join(differences)
        message = f"the ranks have different settings ({different}); launch every rank with the same settings"
        raise met_by_all(InputError(message))


TIMEOUTS = ("Timed out waiting", "timed out", "Wait timeout", "Watchdog caught collective operation timeout")


def is_timeout(error: BaseException) -> bool:
    """Tell if a collective waited too long for another rank."""
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in TIMEOUTS)


def unresponsive_ranks(seconds: float = 3.0) -> list[int]:
    """List the ranks that hang, after a timeout that they do not notice themselves.

    The others report within ``seconds``. None are listed where the store cannot be reached.
    """
    found: list[int] = []

    def ask() -> None:
        with suppress(dist.DistError, RuntimeError):  # the store went down with its rank
            store = dist.distributed_c10d._get_default_store()
            store.set(f"timed out/{rank()}", "")
            missing, deadline = list(range(world_size())), time.monotonic() + seconds
            while missing and time.monotonic() < deadline:
                missing = [r for r in missing if not store.check([f"timed out/{r}"])]
                time.sleep(0.1)
            found.extend(missing)

    # These calls know no timeout: where the link is cut they wait for ever.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(2 * seconds)
    return found


@contextmanager
def raise_on_all_ranks(what: str) -> Iterator[None]:
    """Run a block, and let all ranks fail together if it fails on one.

    The block must hold no collective itself: a rank that left it early would leave the others waiting there.

    Raises:
        InputError, RunError, StoppedError: on every rank, with the failing rank's number and message. A failure counts
            more than a request to stop.
    """
    failure, report = None, None
    try:
        yield
    except Exception as error:
        failure, report = error, {"kind": type(error).__name__, "message": format_error(error)}
        if not isinstance(error, UserError):
            traceback.print_exc()  # a defect, of which the other ranks learn only the last line
    failed = {number: found for number, found in enumerate(gather_json(report)) if found is not None}
    if not failed:
        return
    number, first = min(failed.items(), key=lambda item: item[1]["kind"] == "StoppedError")
    # A cause that all ranks met (a missing file, say) needs no rank in its message.
    alike = len(failed) == world_size() and len({found["message"] for found in failed.values()}) == 1
    message = first["message"] if alike else f"{what} failed on rank {number}: {first['message']}"
    kind = {"InputError": InputError, "StoppedError": StoppedError}.get(first["kind"], RunError)
    raise met_by_all(kind(message)) from failure
