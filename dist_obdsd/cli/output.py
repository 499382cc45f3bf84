"""Results of commands on the terminal, and the one form of every ``--json`` file."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_obdsd.console import NOTICE
from dist_obdsd.errors import InputError

logger = logging.getLogger(__name__)


def show(text: str) -> None:
    """Print a result that every rank knows, once: on rank 0, also with ``--quiet``."""
    logger.log(NOTICE, text)


def check_writable(*paths: Path | None) -> None:
    """Check before the work that its results have a place to go.

    Raises:
        InputError: a file's folder does not exist.
    """
    for path in paths:
        if path is not None and not path.absolute().parent.is_dir():
            raise InputError(f"cannot write {path}: its folder does not exist; make it or choose another")


def write_json(path: Path, meta: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Write ``{"meta": {...}, "rows": [...]}``.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        path.write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another file") from error


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Format measurements: a line per protocol, a column per metric, notes below."""
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    protocols = list(dict.fromkeys(row["protocol"] for row in rows))
    value = {(row["protocol"], row["metric"]): row["value"] for row in rows}
    width = max(len(name) for name in [*protocols, "protocol"])
    columns = [max(12, len(name) + 2) for name in metrics]
    lines = ["protocol".ljust(width) + "".join(name.rjust(w) for name, w in zip(metrics, columns, strict=True))]
    for protocol in protocols:
        cells = ["" if (v := value.get((protocol, name))) is None else f"{v:.4f}" for name in metrics]
        lines.append(protocol.ljust(width) + "".join(cell.rjust(w) for cell, w in zip(cells, columns, strict=True)))
    notes = {row["protocol"]: row["note"] for row in rows if "note" in row}
    return "\n".join(lines + [f"{protocol}: {note}" for protocol, note in notes.items()])
