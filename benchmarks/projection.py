"""What a step would take on many GPUs: the parts measured on one rank, and a stated model of the network.

    step = parts on one rank with b images + objective of b rows among B = W b + messages

    messages = 3 (B - b) D 4 bytes (both gathers, and the sum of the gradients at the embeddings)
             + 2 (W - 1) / W parameters 4 bytes (the all-reduce of the network's gradient)

each divided by ``--gigabytes`` per second and rank, and ``--latency`` microseconds for each doubling of W and message.
Nothing is assumed to overlap, so this is an upper bound; stragglers and shared links are not in it.
"""

import argparse
import math

from benchmarks.report import Row

WORLDS = (8, 64, 512)
MEASURED = "for the projection"
"""Where a row of one rank has its network's parameters and (B, seconds) of its objective; taken out again."""
MESSAGES = 5  # two gathers, their backward, the small sums, the network's gradient
STUDENT = ("student forward", "student backward", "optimizer", "other")


def rows(measured: list[Row], options: argparse.Namespace) -> list[Row]:
    """A row per number of GPUs, or none where no rank was measured alone."""
    alone = next((row for row in measured if MEASURED in row), None)
    if alone is None:
        return []
    parameters, points = alone[MEASURED]["parameters"], alone.pop(MEASURED)["objective"]
    student = sum(alone[part] for part in STUDENT)
    alone["bottleneck_B"] = bottleneck(points, student)
    seconds_at = dict(map(tuple, points))
    b, found = alone["B"], []
    for W in WORLDS:
        B = W * b
        known = seconds_at.get(B)
        row: Row = {"W": W, "B": B, "arm": "obdsd, projected"}
        if known is None:
            found.append(row | {"skipped": "its objective takes longer than the budget on this device"})
            continue
        seconds = messages(W, b, options.dim, parameters, options.gigabytes, options.latency)
        parts = {"teacher": alone["teacher"], "communication": 1000 * seconds, "objective": 1000 * known}
        total = student + sum(parts.values())
        base = student + 1000 * seconds * base_share(W, b, options.dim, parameters)
        found.append(row | {"images_per_s": 1000 * B / total, "ms": total} | parts | {"overhead": total / base})
    return found


def messages(W: int, b: int, dim: int, parameters: int, gigabytes: float, latency: float) -> float:
    """Seconds of all messages of one rank's step."""
    volume = sum(volumes(W, b, dim, parameters))
    return volume / (gigabytes * 1e9) + MESSAGES * math.ceil(math.log2(W)) * latency * 1e-6


def volumes(W: int, b: int, dim: int, parameters: int) -> tuple[float, float]:
    """Bytes of the embeddings' messages and of the network's gradient."""
    return 3 * 4.0 * (W - 1) * b * dim, 2 * 4.0 * parameters * (W - 1) / W


def base_share(W: int, b: int, dim: int, parameters: int) -> float:
    """The part of the messages that the arm ``none`` has, too: all but the teacher's gather."""
    embeddings, gradient = volumes(W, b, dim, parameters)
    return (embeddings * 2 / 3 + gradient) / (embeddings + gradient)


def bottleneck(points: list[tuple[int, float]], student_ms: float) -> float | None:
    """The B from which the objective takes longer than the student's own part, along the line through the two largest
    measured points in log-log; None with fewer than two."""
    if len(points) < 2:
        return None
    (x0, y0), (x1, y1) = points[-2:]
    slope = math.log(y1 / y0) / math.log(x1 / x0)
    return x1 * (student_ms / 1000 / y1) ** (1 / slope) if slope > 0 else None
