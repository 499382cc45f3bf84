"""Shared code of the benchmarks: a command line, processes of their own for each case, and tables."""

import argparse
import datetime
import json
import platform
import signal
import sys
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from dist_obdsd import console
from dist_obdsd.cli.output import check_writable, write_json
from dist_obdsd.distributed import launch
from dist_obdsd.errors import InputError, RunError, UserError
from dist_obdsd.tracking.provenance import hardware

Row = dict[str, Any]
TOLERANCE = 0.2
"""Share by which a finding may be worse than the baseline's."""


# ---- the command line ----


def numbers(text: str) -> list[Any]:
    """Parse ``112,448`` or ``1,0.05``."""
    return list(json.loads(f"[{text}]"))


OPTIONS: dict[str, dict[str, Any]] = {
    "worlds": {"type": numbers, "metavar": "W,W", "help": "numbers of ranks"},
    "sizes": {"type": numbers, "metavar": "B,B", "help": "images of a batch"},
    "batch": {"type": int, "help": "images of a rank"},
    "dim": {"type": int, "help": "embedding dimension"},
    "temperatures": {"type": numbers, "metavar": "T,T", "help": "transition temperatures of obdsd"},
    "budget": {"type": float, "help": "seconds of a case"},
    "rounds": {"type": int, "help": "rounds, in each of which all take their turn"},
    "threads": {"type": int, "help": "CPU threads of a process"},
}
"""What several benchmarks take."""


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The module's text as it is, and every default."""


def parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Make a parser of ``--threads``, ``--json``, ``--baseline`` and those of ``OPTIONS`` that have a default here."""
    parser = argparse.ArgumentParser(description=description, formatter_class=Help)
    for name, default in {**defaults, "threads": 1}.items():
        parser.add_argument(f"--{name}", default=default, **OPTIONS[name])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="compare the findings with an earlier --json")
    return parser


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
        if options.json is not None:
            write_json(options.json, meta(options.threads) | found, rows)
        if found:
            compare(found, options.baseline)
    except UserError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


# ---- processes of their own for each case ----


def run_case(run_rank: Callable[[launch.Runtime, Row], Any], world: int, case: Row, **shown: Any) -> list[Row]:
    """Run a case in fresh processes, so that neither its memory nor its crash reaches the next one.

    Args:
        run_rank: a module's function, called on every rank; the row, or list of rows, of rank 0 is the answer.
        case: has ``threads``, and perhaps ``device``.
        shown: more of the case, with which its rows begin.

    Returns:
        The rows, or one whose ``skipped`` says that a process was killed.

    Raises:
        RunError: a rank failed, with its traceback.
    """
    config = LaunchConfig(
        1, 1, world, run_id=uuid.uuid4().hex, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0
    )
    try:
        answer = elastic_launch(config, _rank)(run_rank, case | shown)[0]
    except ChildFailedError as error:
        if all(failure.exitcode != -signal.SIGKILL for failure in error.failures.values()):
            raise RunError(f"the case {case | shown} on {world} ranks failed:\n{error}") from error
        answer = {"skipped": "a process was killed, most likely for lack of memory"}
    return [shown | row for row in (answer if isinstance(answer, list) else [answer])]


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
        "hardware": hardware(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "threads": threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def table(rows: Sequence[Row]) -> str:
    """Align rows in columns."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns] + [[cell(row.get(name, "")) for name in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def cell(value: Any) -> str:
    """Format a figure with three digits."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 or value == 0 else f"{value:.3g}"


def compare(found: dict[str, float], baseline: Path | None) -> None:
    """Print findings beside those of an earlier ``--json`` file.

    Raises:
        InputError: the file is not one of ours.
        RunError: a finding is worse beyond the tolerance.
    """
    try:
        before = json.loads(baseline.read_text())["meta"] if baseline else {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--baseline {baseline} was not written by a benchmark's --json ({error})") from error
    changes = {name: found[name] / before[name] for name in found if name in before}
    known = {name: {"before": before[name], "now / before": changes[name]} for name in changes}
    print(table([{"finding": name, "now": now} | known.get(name, {}) for name, now in found.items()]))
    if worse := [name for name, change in changes.items() if change > 1 + TOLERANCE]:
        raise RunError(f"worse than the baseline by more than {TOLERANCE:.0%}: {', '.join(worse)}")
