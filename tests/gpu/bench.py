"""The training step's bench at the sizes that the targets are stated for, and what it found beside them."""

import re
import sys
import traceback
from collections.abc import Sequence

from benchmarks import step
from benchmarks.common import Row, cell
from dist_obdsd.errors import RunError, format_error

WAITING = ("backbone", "variant", "images_per_s", "data wait")
WAITING_MEANS = "data wait: the share of the steps' time in which the host was asking for its next batch"
COLUMNS = ("backbone", "pixels", "B", "compiled", "variant", "ms", *step.PARTS, "other", "images_per_s", "overhead",
           "objective share", "peak_mib", "mfu")  # fmt: skip
LARGE = 448
CASES = ((112, False), (LARGE, False), (LARGE, True))
"""Batch, and whether torch.compile makes the kernels, which takes a minute or more at the start."""
OVERHEAD, SHARE, WAIT = 1.30, 0.02, 0.02


def run(quick: bool, budget: float) -> list[Row]:
    """A row per batch and variant: ResNet-50 at 224 pixels in bf16, or something tiny. A case that fails is one
    row with its error; the others are measured nevertheless.

    Args:
        budget: seconds for all of it, besides what starting takes.
    """
    rows: list[Row] = []
    cases = ((8, False),) if quick else CASES
    for B, compiled in cases:
        backbone, side = ("small_cnn", 16) if quick else ("resnet50", 224)
        arguments = ["--worlds", "1", "--precision", "bf16", "--backbone", backbone, "--image-size",
                   str(side), "--batch", str(B), "--budget", str(budget / len(cases)),
                   *["--compile"] * compiled]  # fmt: skip
        about = {"backbone": backbone, "pixels": side, "B": B, "compiled": compiled}
        try:
            measured = step.run(step.parser().parse_args(arguments))
        except Exception as error:
            if isinstance(error, RunError) and "out of memory" in str(error).lower():
                rows.append(about | {"skipped": "this GPU has too little memory for it"})
            else:
                rows.append(about | failure(error))
            continue
        rows += [
            about | row | ({"objective share": row["objective"] / row["ms"]} if "ms" in row else {}) for row in measured
        ]
    return rows


def failure(error: Exception) -> Row:
    """The part of a row that says what failed, in a line; all that is known goes to stderr."""
    if isinstance(error, RunError):
        print(error, file=sys.stderr, flush=True)
    else:
        traceback.print_exc()
    # Of what ranks said, the latest error with a text; the launcher's own, at the end, has none.
    told = re.findall(r"^(?:\[rank\d+\]: )?([\w.]*Error: .+)$", str(error), re.MULTILINE)
    return {"skipped": told[-1] if told else format_error(error).splitlines()[0], "failed": True}


def targets(rows: Sequence[Row]) -> list[Row]:
    """What was aimed at for ResNet-50 on a GPU beside what was found."""
    found = []
    waits = [row for row in rows if "data wait" in row and row["backbone"] == "resnet50"]
    if waits:  # a host that waits for the diffusion, too, can hide less
        worst = max(waits, key=lambda row: row["data wait"])
        what = f"wait for data, {worst['backbone']}, {worst['variant']}"
        found.append(_aim(what, WAIT, worst["data wait"]))
    for row in rows:
        if row.get("variant") != "obdsd" or row["backbone"] != "resnet50" or "overhead" not in row:
            continue
        case = f"ResNet-50, 224 pixels, B={row['B']}{', compiled' * row['compiled']}"
        found.append(_aim(f"step of obdsd / step of none, {case}", OVERHEAD, row["overhead"]))
        if row["B"] == LARGE:
            found.append(_aim(f"objective's share of the step, {case}", SHARE, row["objective share"]))
    return found


def _aim(what: str, limit: float, found: float) -> Row:
    return {"target": what, "at most": limit, "found": found, "verdict": "met" if found <= limit else "missed"}


def markdown(columns: Sequence[str], rows: Sequence[Row]) -> str:
    """A table; a row that was skipped says why in its last cell."""
    kept = [name for name in columns if any(name in row for row in rows)]
    lines = ["| " + " | ".join(kept) + " |", "|" + "---|" * len(kept)]
    for row in rows:
        cells = [cell(row.get(name)) for name in kept]
        if "skipped" in row:
            cells[-1] = row["skipped"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
