"""The run folder ``runs/NAME``: its lock, status and growing file of metrics."""

import fcntl
import json
import os
import platform
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from dist_obdsd.errors import InputError, RunError
from dist_obdsd.files import why_not_written, write_atomically
from dist_obdsd.training.preemption import STOP_FILE


class RunDir:
    """The folder as rank 0 holds it, with a lock that ends with the process."""

    def __init__(self, path: Path) -> None:
        """Create or reopen the folder and lock it.

        Raises:
            InputError: it cannot be written, or a live run holds it.
        """
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / ".lock").open("a")
        except OSError as error:
            raise InputError(f"cannot write the run folder {path}: {error.strerror}; choose another output") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"the run folder {path} is in use by a live run; wait, stop it, or set another name"
            ) from error
        except OSError as error:
            raise InputError(
                f"the run folder {path} cannot be locked ({error.strerror}) against a second run; "
                f"set output to a file system with locks"
            ) from error
        self._metrics: TextIO | None = None

    def write(self, name: str, content: Any) -> Path:
        """Write a file of text, or of anything JSON can hold; return its path."""
        text = content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"
        write_atomically(self.path / name, text.encode())
        return self.path / name

    def cut_metrics(self, global_step: int, tested: bool, pending: bool) -> None:
        """Drop metrics later than the checkpoint, then open their file to append.

        ``tested`` and ``pending``: whether it was made after the test of its step, and before the validation.
        """
        path, kept = self.path / "metrics.jsonl", ""
        for line in path.read_text().splitlines() if path.exists() else ():
            with suppress(ValueError):  # of the line that was being written when the run was killed
                row = json.loads(line)
                # A step's line is written after it, and tests at the run's end after the checkpoint.
                later = ("step", "test of" if tested else "test", *(["validation"] if pending else []))
                ended = row["step"] == global_step > 0 and not row["kind"].startswith(later)
                if row["step"] < global_step or ended:
                    kept += line + "\n"
        write_atomically(path, kept.encode())
        self._metrics = path.open("a", buffering=1)

    def log(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append a line to ``metrics.jsonl``; ``step`` counts optimizer steps from 0."""
        assert self._metrics is not None
        line = json.dumps({"kind": kind, "step": step, **values}) + "\n"
        try:
            self._metrics.write(line)
        except OSError as error:
            reason = why_not_written(error, self.path, len(line))
            raise RunError(
                f"cannot write {self._metrics.name}: {reason}; free some space and start the same command again"
            ) from error

    def close(self) -> None:
        if self._metrics is not None:
            with suppress(OSError):  # it tries to write the failed line once more
                self._metrics.close()
        with suppress(OSError):  # what it asked for is done
            (self.path / STOP_FILE).unlink(missing_ok=True)
        self._lock.close()


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of a run folder; empty where it is missing or not whole."""
    with suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return {}


def read_status(path: Path) -> dict[str, Any]:
    return read_json(path / "status.json")


@dataclass(frozen=True)
class Attempt:
    """One attempt at a run, from a start of its ranks to their end."""

    run_dir: Path
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    """The same on all ranks."""

    def write_status(self, state: str, message: str) -> None:
        """Write running, finished, preempted or failed, for scripts to read."""
        status = {
            "state": state, "message": message, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "attempt": self.id,
            "host": platform.node(), "pid": os.getpid(),
        }  # fmt: skip
        write_atomically(self.run_dir / "status.json", (json.dumps(status) + "\n").encode())

    def write_failure(self, message: str) -> None:
        """Write failed, unless another attempt runs or another rank wrote the cause."""
        status = read_status(self.run_dir)
        if (status.get("state"), status.get("attempt")) == ("running", self.id):
            with suppress(RunError):  # a full disk must not hide what went wrong before
                self.write_status("failed", message)


def free_name(output: Path, name: str) -> str:
    """The first of NAME, NAME-2, NAME-3, ... whose folder does not exist."""
    free, number = name, 2
    while (output / free).exists():
        free, number = f"{name}-{number}", number + 1
    return free
