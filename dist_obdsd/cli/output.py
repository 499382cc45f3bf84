"""Results on the terminal and in ``--json`` files."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_obdsd.console import NOTICE
from dist_obdsd.errors import InputError

logger = logging.getLogger(__name__)


def show(text: str) -> None:
    """Print a result that every rank knows, on rank 0, also with ``--quiet``."""
    logger.log(NOTICE, text)


def check_writable(*paths: Path | None) -> None:
    """Check before the work that its results have a place to go, or raise InputError."""
    for path in paths:
        if path is not None and not path.absolute().parent.is_dir():
            raise InputError(f"cannot write {path}: its folder does not exist; make it or choose another")
        if path is not None and path.is_dir():
            raise InputError(f"cannot write {path}: it is a folder; choose a file")


def write_json(path: Path, meta: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Write ``{"meta": {...}, "rows": [...]}``, also to a pipe, or raise InputError."""
    try:
        path.write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another file") from error


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Format measurements: a line per protocol, a column per metric, notes below."""
    value = {(row["protocol"], row["metric"]): f"{row['value']:.4f}" for row in rows}
    protocols, metrics = (list(dict.fromkeys(row[name] for row in rows)) for name in ("protocol", "metric"))
    width = max(map(len, [*protocols, "protocol"]))
    lines = ["protocol".ljust(width) + "".join(name.rjust(max(12, len(name) + 2)) for name in metrics)]
    for protocol in protocols:
        cells = (value.get((protocol, name), "").rjust(max(12, len(name) + 2)) for name in metrics)
        lines.append(protocol.ljust(width) + "".join(cells))
    notes = {row["note"]: row["protocol"] for row in reversed(rows) if "note" in row}  # once, of the first that has it
    return "\n".join(lines + [f"{protocol}: {note}" for note, protocol in reversed(notes.items())])
