"""What every benchmark shares: a process per case, and rows as a table, a JSON file or a log-log plot."""

import datetime
import json
import math
import multiprocessing
import platform
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from dist_obdsd.errors import InputError, RunError
from dist_obdsd.machine import usable_cores
from dist_obdsd.tracking.provenance import processor

Row = dict[str, Any]


def in_own_process(case: Callable[..., Row], *args: Any, seconds: float) -> Row:
    """Run one case in a fresh process, so that neither its memory nor its crash reaches the next one.

    Args:
        case: a module-level function; returns figures that pickle.
        seconds: after which the process is killed.

    Returns:
        What the case returned, with ``peak_mib`` if it has none yet: on CPU the most that its whole process had
        resident (the libraries alone are some hundreds of MiB), on a GPU the most that torch had allocated. A case that
        was killed gives
        ``{"skipped": reason}`` instead.

    Raises:
        RunError: the case failed, with its traceback.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, case, args), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            return {"skipped": f"took more than {seconds:.0f} s"}
        failed, answer = receiver.recv()
    except EOFError:
        process.join()
        return {"skipped": f"its process ended with {process.exitcode}, most likely for lack of memory"}
    finally:
        process.kill()
        process.join()
    if failed:
        raise RunError(f"the case {case.__name__}{args} failed:\n{answer}")
    return answer


def _answer(sender: Any, case: Callable[..., Row], args: tuple[Any, ...]) -> None:
    try:
        row = case(*args)
        sender.send((False, {"peak_mib": peak_mib()} | row))
    except Exception:
        sender.send((True, traceback.format_exc()))


def peak_mib() -> float:
    """The most memory that this process held: of the GPU if torch used one, else resident."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    # Not getrusage: its maximum survives exec and would start at the parent's size.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


def meta(options: Any) -> dict[str, Any]:
    """What the figures were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return {
        "date": datetime.date.today().isoformat(),
        "device": device,
        "cores": usable_cores(),
        "threads": options.threads,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


def table(rows: Sequence[Row]) -> str:
    """Rows as aligned columns; a row that was skipped says why in place of its figures."""
    columns = list(dict.fromkeys(name for row in rows for name in row if name != "skipped"))
    lines = [columns] + [[_cell(row.get(name)) for name in columns] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    for i, row in enumerate(rows):
        if "skipped" in row:
            text[i + 1] += f"  {row['skipped']}"
    return "\n".join(text)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 or value == 0 else f"{value:.3g}"


def against(baseline: Path, found: Mapping[str, float], tolerance: float) -> list[Row]:
    """A bench's findings beside those of an earlier ``--json`` file, by ratio; all of them are the better the less.

    Absolute times say nothing on another machine, so only findings are compared: ratios and exponents of one run.

    Returns:
        Rows with ``finding``, ``before``, ``now``, ``change`` (now / before) and ``verdict``: better or worse beyond
        the tolerance, alike, or not in the other file.

    Raises:
        InputError: the file is not one of ours.
    """
    try:
        before = json.loads(baseline.read_text())["meta"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--baseline {baseline} is no file that bench --json wrote ({error})") from error
    rows: list[Row] = []
    for name, now in found.items():
        if name not in before:
            rows.append({"finding": name, "now": now, "verdict": "new"})
            continue
        change = now / before[name]
        verdict = "worse" if change > 1 + tolerance else "better" if change < 1 / (1 + tolerance) else "alike"
        rows.append({"finding": name, "before": before[name], "now": now, "change": change, "verdict": verdict})
    return rows


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """The slope of the least-squares line through (log x, log y): 2 where y grows as x squared."""
    xs, ys = ([math.log(p[i]) for p in points] for i in (0, 1))
    x0, y0 = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - x0) * (y - y0) for x, y in zip(xs, ys, strict=True)) / sum((x - x0) ** 2 for x in xs)


def plot(path: Path, rows: Sequence[Row], x: str, y: str, label: Callable[[Row], str], title: str) -> None:
    """Write a log-log plot of ``y`` over ``x``, one line per label. The suffix of ``path`` chooses the format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if "skipped" not in row:
            lines.setdefault(label(row), []).append((row[x], row[y]))
    for (name, points), marker in zip(lines.items(), "osD^vPX*<>" * len(lines), strict=False):
        axes.loglog(*zip(*sorted(points), strict=True), marker=marker, markersize=5, label=name)
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
