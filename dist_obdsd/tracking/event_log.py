"""The event log: what a run tells its server, on disk before it is sent.

Format version 1. ``runs/NAME/tracking.jsonl`` has one JSON object a line. The first is the header. Every other line is
an event, with a running number and its time in milliseconds since 1970::

    {"format": "dist-obdsd event log 1", "run": local id, "uri": the server, "config": {...}, "manifest": sha256}
    {"n": 1, "time": ms, "kind": "start", "tags": {...}}                       # again whenever the run is resumed
    {"n": 2, "time": ms, "kind": "params", "values": {name: text}}
    {"n": 3, "time": ms, "kind": "metrics", "step": 0, "values": {name: number}}
    {"n": 4, "time": ms, "kind": "tags", "values": {name: text}}
    {"n": 5, "time": ms, "kind": "dataset", "name": ..., "digest": ..., "source": ..., "profile": {...}}
    {"n": 6, "time": ms, "kind": "artifact", "path": from the run folder, or absolute}
    {"n": 7, "time": ms, "kind": "model", "path": of a checkpoint, likewise}
    {"n": 8, "time": ms, "kind": "end", "status": "FINISHED"}

``tracking.state.json`` beside it says how much of the log the server has. ``metrics.jsonl`` cannot serve as this log:
it is cut back when a run resumes, but what the server was told cannot be taken back.
"""

import fcntl
import itertools
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_obdsd.errors import InputError
from dist_obdsd.files import write_atomically

FORMATS = ("dist-obdsd event log 1", "dist-obdsd spool 1")
"""The format that is written, and its former name."""
NAME = "tracking.jsonl"
LOCAL = "local-"
"""The begin of a run id that no server has given."""
BATCH = 100
"""Events of metrics that are sent together at most."""

Event = dict[str, Any]


@dataclass
class UploadState:
    """The part of an event log that a server has acknowledged."""

    run: str
    """Local id of the log's run."""
    uri: str
    run_id: str | None = None
    """MLflow's id; None until the server was reached."""
    sent: int = 0
    """Bytes of the log that the server has, the header included."""
    number: int = 0
    """Number of the last event in them."""

    @staticmethod
    def path(log: Path) -> Path:
        return log.with_suffix(".state.json")

    @classmethod
    def load(cls, log: Path, header: Mapping[str, Any], uri: str | None = None) -> "UploadState":
        """Read the state beside a log; a new one without any, or for another ``uri``."""
        state = new = cls(header["run"], uri or header["uri"])
        with suppress(OSError, ValueError, TypeError):  # none, or not whole: what is sent again changes nothing
            state = cls(**json.loads(cls.path(log).read_text()))
        if state.run != new.run or uri not in (None, state.uri):  # of a log that lay here before, or of another server
            return new
        state.sent = min(state.sent, log.stat().st_size)  # a power cut may have taken the log's last lines
        return state

    def save(self, log: Path) -> None:
        write_atomically(self.path(log), (json.dumps(asdict(self)) + "\n").encode())


class EventLog:
    """Appends events to a file. It never waits for a server.

    A parameter is written once, since MLflow's cannot change. A metric is written once per step: steps that are done
    again after a kill have other times and seconds, and MLflow would show both.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        """Continue the log at ``path``, or begin it with ``header``."""
        self.path, self.number = path, 0
        self._last: dict[tuple[str, str], int] = {}  # the last step of each metric; a run's steps only go up
        whole = 0
        if path.exists():
            for event, end in read_events(path):
                whole, self.number = end, event["n"]
                self._unwritten(event)
        self._file = path.open("ab", buffering=0)
        self._file.truncate(whole)  # without the line that was being written when the run was killed
        if not whole:
            self._write(header)

    def append(self, kind: str, **fields: Any) -> None:
        """Write an event; OSError where the disk is full or gone."""
        event = {"n": self.number + 1, "time": int(time.time() * 1000), "kind": kind, **fields}
        if kind in ("params", "metrics"):
            event["values"] = self._unwritten(event)
        if event.get("values", True):
            self.number += 1
            self._write(event)

    def _unwritten(self, event: Event) -> dict[str, Any]:
        """Return and remember the event's parameters or metrics that the log lacks."""
        kind, step = event["kind"], event.get("step", 0)
        values = event["values"] if kind in ("params", "metrics") else {}
        new = {name: value for name, value in values.items() if self._last.get((kind, name), -1) < step}
        self._last |= {(kind, name): step for name in new}
        return new

    def _write(self, row: Mapping[str, Any]) -> None:
        data = (json.dumps(row) + "\n").encode()
        if self._file.write(data) != len(data):
            raise OSError("the disk is full")

    def close(self) -> None:
        self._file.close()


def read_header(path: Path) -> dict[str, Any]:
    """Read the first line of a log; InputError where there is none of this format."""
    try:
        with path.open("rb") as file:
            header: dict[str, Any] = json.loads(file.readline())
        found = header["format"]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; give a run folder or its {NAME}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no event log of a tracked run; give a run folder or its {NAME}") from error
    if found not in FORMATS:
        raise InputError(f"{path} has format {found!r} but this program reads {FORMATS[0]!r}")
    return header


def read_events(path: Path, start: int = 0) -> Iterator[tuple[Event, int]]:
    """Iterate over whole events from byte ``start`` on, each with its end in bytes."""
    with path.open("rb") as file:
        file.seek(start)
        end = start
        for line in file:
            if not line.endswith(b"\n"):  # still being written
                return
            end += len(line)
            if end == len(line):  # the header
                continue
            try:
                event = json.loads(line)
                event["n"], event["kind"]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path} is damaged before byte {end}: a line there is no event") from error
            yield event, end


def read_batches(path: Path, start: int) -> Iterator[tuple[list[Event], int]]:
    """Iterate over events to send together (only ``metrics`` are), with their end."""
    for kind, found in itertools.groupby(read_events(path, start), lambda pair: pair[0]["kind"]):
        while batch := list(itertools.islice(found, BATCH if kind == "metrics" else 1)):
            yield [event for event, _ in batch], batch[-1][1]


@contextmanager
def upload_lock(path: Path) -> Iterator[None]:
    """Hold the right to send a log; InputError where another process has it."""
    with path.open("r+b") as file:  # NFS locks only what may be written
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"a live run or a replay is sending {path}; wait for its end") from error
        yield


def time_of_kill(path: Path) -> int | None:
    """Return the last event's time of a run that never logged its end, else None."""
    last, ended = 0, True
    for event, _ in read_events(path):
        last, ended = event["time"], (ended or event["kind"] == "end") and event["kind"] != "start"
    return None if ended else last
