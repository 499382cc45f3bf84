"""The spool: what a run tells its tracking server, on the disk before it is sent. Format version 1.

``runs/NAME/tracking.jsonl`` has one JSON object a line. The first says whose calls these are, every other one is a call
with a running number and the time at which it was made, in milliseconds since 1970::

    {"format": "dist-obdsd spool 1", "run": local id, "uri": the server, "config": {...}, "manifest": sha256}
    {"n": 1, "time": ms, "kind": "start", "tags": {...}}                       # again whenever the run is resumed
    {"n": 2, "time": ms, "kind": "params", "values": {name: text}}
    {"n": 3, "time": ms, "kind": "metrics", "step": 0, "values": {name: number}}
    {"n": 4, "time": ms, "kind": "tags", "values": {name: text}}
    {"n": 5, "time": ms, "kind": "dataset", "name": ..., "digest": ..., "source": ..., "profile": {...}}
    {"n": 6, "time": ms, "kind": "artifact", "path": from the spool's folder, or absolute}
    {"n": 7, "time": ms, "kind": "model", "path": of a checkpoint, likewise}
    {"n": 8, "time": ms, "kind": "end", "status": "FINISHED"}

``tracking.state.json`` beside it remembers where the calls went and how far the server has taken them.

A metric stands in the spool once per step. Steps that are done again after a kill find their numbers there and are not
written a second time: MLflow would keep both, since times and wall-clock values such as ``seconds`` differ.
"""

import fcntl
import json
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_obdsd.config import changed_settings
from dist_obdsd.errors import InputError
from dist_obdsd.files import write_atomically

FORMAT = "dist-obdsd spool 1"
NAME = "tracking.jsonl"
LOCAL = "local-"
"""What the ids of runs begin with that no server has given."""
BATCH = 1000
"""Numbers that are sent together: MLflow's largest ``log_batch``."""

Call = dict[str, Any]


@dataclass
class State:
    """What the server of a spool has, as far as it was acknowledged."""

    run: str
    """The spool's local id."""
    uri: str
    run_id: str | None = None
    """MLflow's id; None until the server was reached."""
    sent: int = 0
    """Bytes of the spool that the server has taken, the first line included."""
    number: int = 0
    """Of the last call in them."""

    @staticmethod
    def path(spool: Path) -> Path:
        return spool.with_suffix(".state.json")

    @classmethod
    def load(cls, spool: Path, head: Mapping[str, Any]) -> "State":
        """
        Raises:
            InputError: it is not readable, or of another spool.
        """
        path = cls.path(spool)
        if not path.exists():
            return cls(head["run"], head["uri"])
        try:
            state = cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{path} is not readable ({error}); remove it to send all of {spool} again") from error
        if state.run != head["run"]:
            raise InputError(
                f"{path} is of run {state.run} but {spool} of run {head['run']}; remove {path.name} to send all of it"
            )
        state.sent = min(state.sent, spool.stat().st_size)  # a power cut may have taken the spool's last lines
        return state

    def save(self, spool: Path) -> None:
        write_atomically(self.path(spool), (json.dumps(asdict(self)) + "\n").encode())

    def forget(self, uri: str) -> None:
        """Begin again, with a new run there."""
        self.uri, self.run_id, self.sent, self.number = uri, None, 0, 0


class Spool:
    """The end to which a run appends. Nothing here waits for anybody but the disk."""

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        """Continue the spool at ``path``, or begin it with ``head``.

        Raises:
            OSError: it cannot be written.
        """
        self.path, self.number = path, 0
        self._params: set[str] = set()
        self._last: dict[str, int] = {}  # the last step of each metric; a run's steps only go up
        whole = 0
        if path.exists():
            for call, end in calls(path, 0):
                whole, self.number = end, call["n"]
                if call["kind"] == "params":
                    self._params |= call["values"].keys()
                elif call["kind"] == "metrics":
                    self._last |= dict.fromkeys(call["values"], call["step"])
        self._file = path.open("ab", buffering=0)
        self._file.truncate(whole)  # without the line that was being written when the run was killed
        if not whole:
            self._write(head)

    def append(self, kind: str, **fields: Any) -> None:
        """Write a call down.

        Raises:
            OSError: the disk is full or gone.
        """
        self.number += 1
        self._write({"n": self.number, "time": int(time.time() * 1000), "kind": kind, **fields})

    def params(self, values: Mapping[str, Any]) -> None:
        """As ``append``, of those that are new: MLflow's cannot change."""
        new = {name: str(value) for name, value in values.items() if name not in self._params}
        if new:
            self._params |= new.keys()
            self.append("params", values=new)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """As ``append``, of those that the spool does not have at this step."""
        new = {name: float(value) for name, value in values.items() if self._last.get(name, -1) < step}
        if new:
            self._last |= dict.fromkeys(new, step)
            self.append("metrics", step=step, values=new)

    def _write(self, row: Mapping[str, Any]) -> None:
        data = (json.dumps(row) + "\n").encode()
        if self._file.write(data) != len(data):
            raise OSError("the disk is full")

    def close(self) -> None:
        self._file.close()


def new_head(uri: str, config: dict[str, Any], manifest: str, run: str | None = None) -> dict[str, Any]:
    """The first line of a spool.

    Args:
        run: the local id that the run had in a spool that is lost.
    """
    run = run or LOCAL + uuid.uuid4().hex
    return {"format": FORMAT, "run": run, "uri": uri, "config": config, "manifest": manifest}


def read_head(path: Path) -> dict[str, Any]:
    """
    Raises:
        InputError: there is no spool of this format.
    """
    try:
        with path.open("rb") as file:
            head = json.loads(file.readline())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; give a run folder or its {NAME}") from error
    except ValueError as error:
        raise InputError(f"{path} is no spool of a tracked run; give a run folder or its {NAME}") from error
    found = head.get("format") if isinstance(head, dict) else None
    if found != FORMAT:
        raise InputError(f"{path} has format {found!r} but this program reads {FORMAT!r}")
    return head


def whose(head: Mapping[str, Any], config: dict[str, Any], manifest: str) -> str:
    """What tells a spool's run from one with these settings and this data; empty if they are the same run."""
    changes = changed_settings(head["config"], config)
    if head["manifest"] != manifest:
        changes.append(f"manifest: {head['manifest'][:12]} -> {manifest[:12]}")
    return "; ".join(changes)


def calls(path: Path, start: int) -> Iterator[tuple[Call, int]]:
    """The whole calls from a place on, each with the place where it ends, in bytes.

    Raises:
        InputError: a line is no call.
    """
    with path.open("rb") as file:
        file.seek(start)
        end = start
        for line in file:
            if not line.endswith(b"\n"):  # still being written
                return
            end += len(line)
            if end == len(line):  # the first line of the file
                continue
            try:
                call = json.loads(line)
                call["n"], call["kind"]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path} is damaged before byte {end}: a line there is no call") from error
            yield call, end


def batches(path: Path, start: int) -> Iterator[tuple[list[Call], int]]:
    """As ``calls``, with neighbouring ``metrics`` together, up to ``BATCH`` numbers."""
    waiting: list[Call] = []
    numbers, end = 0, start
    for call, after in calls(path, start):
        size = len(call["values"]) if call["kind"] == "metrics" else BATCH
        if waiting and numbers + size > BATCH:
            yield waiting, end
            waiting, numbers = [], 0
        waiting.append(call)
        numbers, end = numbers + size, after
    if waiting:
        yield waiting, end


@contextmanager
def sending(path: Path) -> Iterator[None]:
    """The right to send, of which there is one: a live run's thread or a replay has it.

    Raises:
        InputError: somebody else has it.
    """
    with path.open("r+b") as file:  # to write, since NFS wants that for a lock
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"a live run or a replay is sending {path}; wait for its end") from error
        yield


def unfinished(rows: Iterable[tuple[Call, int]]) -> int | None:
    """The time of the last call of a run that never said how it ended; None if it did."""
    last, open_ended = 0, False
    for call, _ in rows:
        last = call["time"]
        if call["kind"] in ("start", "end"):
            open_ended = call["kind"] == "start"
    return last if open_ended else None
