"""Benchmarks over several processes, started as a user starts them."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.report import Row
from dist_obdsd.errors import RunError

START_SECONDS = 120.0  # that starting the ranks may take besides the budget
END_SECONDS = 40.0  # that torchrun may take to end its ranks; it kills them itself after 30


def on_ranks(module: str, world: int, case: Any, budget: float) -> Any:
    """Run a case on ``world`` ranks under torchrun. What they said on stderr is passed on at the end, each line once.

    Args:
        module: what each rank runs with the case, as JSON, as its argument; rank 0's last line is the answer, as JSON.

    Returns:
        The answer, or ``{"skipped": reason}`` where it took longer than twice the budget.

    Raises:
        RunError: a rank failed, with what it said.
    """
    seconds = START_SECONDS + 2 * budget
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}",
               "-m", module, json.dumps(case)]  # fmt: skip
    # What torchrun sets for several ranks, and would say that it does.
    env = ({"OMP_NUM_THREADS": "1"} if world > 1 else {}) | os.environ
    # In a session of its own, so that a terminal's Ctrl-C reaches this process alone, which then ends the ranks.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=env
    )
    try:
        said, complaint = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        _end(process)
        skipped: Row = {"skipped": f"took more than {seconds:.0f} s"}
        return skipped
    except BaseException:
        _end(process)
        raise
    if process.returncode:
        raise RunError(f"the case {case} on {world} ranks failed:\n{complaint}")
    for line in dict.fromkeys(complaint.splitlines()):
        print(line, file=sys.stderr, flush=True)
    return json.loads(said.splitlines()[-1])


def _end(process: subprocess.Popen[str]) -> None:
    """End the launcher and its ranks."""
    # Every rank is in a session of its own, too: only the launcher, asked in good order, ends them all.
    process.terminate()
    try:
        process.communicate(timeout=END_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def matmul_flops(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Operations per second of a large matrix product here: the best of several tries."""
    side = 1024 if device.type == "cpu" else 8192
    a, b = torch.randn(2, side, side, device=device, dtype=dtype).unbind()
    best = math.inf
    for _ in range(8):
        started = time.perf_counter()
        float((a @ b)[0, 0])  # reading a number waits for a GPU
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best
