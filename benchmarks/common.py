"""Shared code of the benchmarks: a command line, a process per case, and tables.

``python -m benchmarks.common MODULE CASE`` is one rank of a case; ``run_case`` starts it.
"""

import argparse
import datetime
import importlib
import json
import logging
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dist_obdsd import console
from dist_obdsd.cli.output import check_writable, write_json
from dist_obdsd.distributed import launch
from dist_obdsd.errors import InputError, RunError, UserError
from dist_obdsd.machine import usable_cores
from dist_obdsd.tracking.provenance import processor

Row = dict[str, Any]
ROOT = str(Path(__file__).parents[1])
START_SECONDS = 120.0
"""Time that starting the ranks may take besides the budget."""
TOLERANCE = 0.2
"""Share by which a finding may be worse than the baseline's."""


# ---- the command line ----


def parser(description: str | None, worlds: Sequence[int] | None = None) -> argparse.ArgumentParser:
    """Make the parser of what every benchmark takes, and ``--worlds`` if it has a default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=128, help="embedding dimension (default: 128)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per process (default: 1)")
    parser.add_argument("--budget", type=float, default=120, help="seconds that one case may take (default: 120)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="compare the findings with an earlier --json")
    if worlds:
        shown = ",".join(map(str, worlds))
        parser.add_argument("--worlds", type=numbers, default=worlds, metavar="W,W", help=f"ranks (default: {shown})")
    return parser


def numbers(text: str) -> list[int]:
    """Parse ``--sizes 112,448``."""
    return [int(number) for number in text.split(",")]


def main(
    options: argparse.Namespace,
    run: Callable[[argparse.Namespace], list[Row]],
    findings: Callable[[list[Row]], dict[str, float]] = lambda rows: {},
) -> int:
    """Run a benchmark, print its table and compare its findings with the baseline.

    Args:
        findings: figures by name that the rows show together; the less, the better.

    Returns:
        The exit code: 0; 1 where a case failed or a finding is worse than the baseline's; 2 for bad input.
    """
    try:
        check_writable(options.json)
        with console.log_to_terminal():
            rows = run(options)
        print(table(rows))
        found = findings(rows)
        for name, value in found.items():
            print(f"{name}: {value:.3g}")
        if options.json is not None:
            write_json(options.json, meta(options.threads) | found, rows)
        compared = compare(options.baseline, found) if options.baseline is not None else []
    except UserError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    if compared:
        print(table(compared))
    return 1 if any(row["verdict"] == "worse" for row in compared) else 0


# ---- a process per case ----


def run_case(module: str, world: int, case: Row) -> list[Row]:
    """Run a case in fresh processes, so that neither its memory nor its crash reaches the next one.

    Several ranks start under torchrun. Their messages on stderr are passed on at the end, each line once.

    Args:
        module: its ``run_rank(rank, case)`` runs on every rank; the row, or list of rows, of rank 0 is the answer.
        case: has ``threads`` and ``budget``, in seconds.

    Returns:
        The rows, or one ``{"skipped": reason}`` where it took longer than twice the budget or was killed.

    Raises:
        RunError: a rank failed, with its messages.
    """
    seconds = START_SECONDS + 2 * case["budget"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
    command = [sys.executable, *torchrun, "-m", "benchmarks.common", module, json.dumps(case)]
    # torchrun sets OMP_NUM_THREADS for several ranks, and would print that it does.
    env = ({"OMP_NUM_THREADS": "1"} if world > 1 else {}) | os.environ
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))
    # In a session of its own, so that a terminal's Ctrl-C reaches this process alone, which then ends the ranks.
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=env
    ) as process:
        try:
            output, messages = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return [{"skipped": f"took more than {seconds:.0f} s"}]
        finally:
            process.terminate()  # torchrun ends its ranks, which no signal to a process group would reach
    if process.returncode == -signal.SIGKILL or (process.returncode and "SIGKILL" in messages):
        return [{"skipped": "a process was killed, most likely for lack of memory"}]
    if process.returncode:
        raise RunError(f"the case {case} on {world} ranks failed:\n{messages}")
    for line in dict.fromkeys(messages.splitlines()):
        print(line, file=sys.stderr, flush=True)
    answer = json.loads(output.splitlines()[-1])
    return answer if isinstance(answer, list) else [answer]


def _run_rank(module: str, case: Row) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # on stderr; the answer alone is on stdout
    run_rank = importlib.import_module(module).run_rank
    timeout = START_SECONDS + 2 * case["budget"]
    with launch.start(case.get("device", "auto"), threads=case["threads"], timeout_seconds=timeout) as rank:
        answer = run_rank(rank, case)
        if rank.is_main:
            print(json.dumps(answer), flush=True)


# ---- results ----


def peak_mib() -> float:
    """Return the most memory that this process held: of the GPU if torch used one, else resident."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    # Not getrusage: its maximum survives exec and would start at the parent's size.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


def meta(threads: int) -> Row:
    """Describe the machine and the software."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "cores": usable_cores(),
        "threads": threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def table(rows: Sequence[Row]) -> str:
    """Align rows in columns; a row that was skipped ends with its reason in place of its figures."""
    columns = list(dict.fromkeys(name for row in rows for name in row if name != "skipped"))
    lines = [columns] + [[cell(row.get(name)) for name in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    reasons = ["", *(f"  {row['skipped']}" if "skipped" in row else "" for row in rows)]
    return "\n".join(
        "  ".join(map(str.rjust, line, widths)) + reason for line, reason in zip(lines, reasons, strict=True)
    )


def cell(value: Any) -> str:
    """Format a figure with three digits; None as nothing."""
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:.0f}" if abs(value) >= 1000 or value == 0 else f"{value:.3g}"


def compare(baseline: Path, found: Mapping[str, float]) -> list[Row]:
    """Set findings, which are ratios of one run, beside those of an earlier ``--json`` file.

    Returns:
        Rows with ``finding``, ``before``, ``now``, ``change`` (now / before) and ``verdict``: better or worse beyond
        the tolerance, alike, or new.

    Raises:
        InputError: the file is not one of ours.
    """
    try:
        before = json.loads(baseline.read_text())["meta"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--baseline {baseline} was not written by a benchmark's --json ({error})") from error
    rows: list[Row] = []
    for name, now in found.items():
        if name not in before:
            rows.append({"finding": name, "now": now, "verdict": "new"})
            continue
        change = now / before[name]
        verdict = "worse" if change > 1 + TOLERANCE else "better" if change < 1 / (1 + TOLERANCE) else "alike"
        rows.append({"finding": name, "before": before[name], "now": now, "change": change, "verdict": verdict})
    return rows


if __name__ == "__main__":
    _run_rank(sys.argv[1], json.loads(sys.argv[2]))
