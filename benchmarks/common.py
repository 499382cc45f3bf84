"""Shared code of the benchmarks: a command line, processes of their own for each case, and tables."""

import argparse
import datetime
import json
import platform
import signal
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from dist_obdsd import console
from dist_obdsd.cli.output import check_writable, write_json
from dist_obdsd.distributed import launch
from dist_obdsd.errors import InputError, RunError, UserError
from dist_obdsd.machine import usable_cores
from dist_obdsd.tracking.provenance import processor

Row = dict[str, Any]
TOLERANCE = 0.2
"""Share by which a finding may be worse than the baseline's."""


# ---- the command line ----


def parser(description: str | None, worlds: Sequence[int] | None = None) -> argparse.ArgumentParser:
    """Make the parser of what every benchmark takes, and ``--worlds`` if it has a default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per process (default: 1)")
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
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    run: Callable[[argparse.Namespace], list[Row]],
    findings: Callable[[list[Row]], dict[str, float]] = lambda rows: {},
) -> int:
    """Run a benchmark, print its table and compare its findings with the baseline.

    Args:
        arguments: of the command line; None takes this program's.
        findings: figures by name that the rows show together; the less, the better.

    Returns:
        The exit code: 0; 1 where a case failed or a finding is worse than the baseline's; 2 for bad input.
    """
    options = parser.parse_intermixed_args(arguments)
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


# ---- processes of their own for each case ----


def run_case(run_rank: Callable[[launch.Runtime, Row], Any], world: int, case: Row) -> list[Row]:
    """Run a case in fresh processes, so that neither its memory nor its crash reaches the next one.

    Args:
        run_rank: a module's function, called on every rank; the row, or list of rows, of rank 0 is the answer.
        case: has ``threads``, and perhaps ``device``.

    Returns:
        The rows, or one ``{"skipped": reason}`` where a process was killed.

    Raises:
        RunError: a rank failed, with its traceback.
    """
    config = LaunchConfig(
        1, 1, world, run_id=uuid.uuid4().hex, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0
    )
    try:
        answer = elastic_launch(config, _rank)(run_rank, case)[0]
    except ChildFailedError as error:
        if any(failure.exitcode == -signal.SIGKILL for failure in error.failures.values()):
            return [{"skipped": "a process was killed, most likely for lack of memory"}]
        raise RunError(f"the case {case} on {world} ranks failed:\n{error}") from error
    return answer if isinstance(answer, list) else [answer]


def _rank(run_rank: Callable[[launch.Runtime, Row], Any], case: Row) -> Any:
    with (
        launch.start(case.get("device", "auto"), threads=case["threads"]) as rank,
        console.log_to_terminal(rank.is_main),
    ):
        return run_rank(rank, case)


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
        Rows whose ``verdict`` is better or worse beyond the tolerance, alike, or new.

    Raises:
        InputError: the file is not one of ours.
    """
    try:
        before = json.loads(baseline.read_text())["meta"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--baseline {baseline} was not written by a benchmark's --json ({error})") from error

    def verdict(name: str, now: float) -> str:
        if name not in before:
            return "new"
        change = now / before[name]
        return "worse" if change > 1 + TOLERANCE else "better" if change < 1 / (1 + TOLERANCE) else "alike"

    return [
        {"finding": name, "before": before.get(name), "now": now, "verdict": verdict(name, now)}
        for name, now in found.items()
    ]
