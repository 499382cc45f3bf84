"""The checks by name, cheap ones first. Each takes a device, and whether to be quick, and says what it found."""

import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from dist_obdsd.errors import format_error
from tests.gpu import feeding, ranks, solving, steps, whole
from tests.gpu.rig import CheckError, Skipped

Check = Callable[[torch.device, bool], str]
CHECKS: dict[str, Check] = {
    "solvers": solving.solvers_agree,
    "masked": steps.masked_step_changes_nothing,
    "waiting": steps.step_does_not_wait,
    "group": ranks.group_of_one,
    "uploads": feeding.uploads_arrive,
    "layout": steps.layout_and_chunks_change_nothing,
    "exact": steps.step_is_exact,
    "evaluation": whole.evaluation_is_the_same,
    "resumed": whole.resumed_run_is_the_same,
    "ranks": ranks.ranks_are_one_batch,
    "compiled": steps.compiled_step_is_the_same,
}


def run(name: str, device: torch.device, quick: bool) -> dict[str, Any]:
    """One check: ``check``, ``verdict`` (ok, skipped or failed), ``seconds`` and ``found``, a text."""
    started = time.perf_counter()
    try:
        verdict, found = "ok", CHECKS[name](device, quick)
    except Skipped as reason:
        verdict, found = "skipped", str(reason)
    except CheckError as error:
        verdict, found = "failed", str(error)
    except Exception as error:  # a defect, or a device that lacks something; the other checks go on
        traceback.print_exc()
        verdict, found = "failed", format_error(error)
    return {"check": name, "verdict": verdict, "seconds": time.perf_counter() - started, "found": found}
