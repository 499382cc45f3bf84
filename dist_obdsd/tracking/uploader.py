"""Upload of an event log: by a live run's thread, or by ``replay`` afterwards."""

import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from dist_obdsd.console import NOTICE
from dist_obdsd.errors import InputError, RunError
from dist_obdsd.tracking import event_log
from dist_obdsd.tracking.event_log import UploadState
from dist_obdsd.tracking.mlflow_backend import MLflowBackend, absolute, short_reason

INTERVAL = 2.0  # seconds between two looks into the log
MODEL_PATIENCE = 5  # times longer that a model may take, which has to be made first
PATIENCE = (1.0, 60.0)  # seconds from a failure to the next attempt: doubled from the first to the second

logger = logging.getLogger(__name__)


def upload(path: Path, state: UploadState, backend: MLflowBackend, stop: Callable[[], bool] = lambda: False) -> int:
    """Send what is missing, note it after every batch, and return the number sent."""
    sent = 0
    for events, end in event_log.read_batches(path, state.sent):
        if stop():
            break
        backend.send(events)
        sent += len(events)
        state.sent, state.number = end, events[-1]["n"]
        state.save(path)
    return sent


class Uploader:
    """A thread that sends a live run's event log. The file itself is the queue."""

    def __init__(self, path: Path, state: UploadState) -> None:
        """Start the thread, which alone changes ``state`` from now on."""
        self.state, self.trouble = state, ""
        self.answered = threading.Event()
        """Set once the server has taken events, or an attempt has failed."""
        self._path, self._lock = path, ExitStack()
        self._backend: MLflowBackend | None = None
        self._warned = False
        self._closing, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        self._thread.start()

    def close(self, seconds: float) -> None:
        """Send what is left, for at most so long. ``trouble`` says what was in the way."""
        self._closing.set()
        self._thread.join(seconds)
        if self._backend is not None and self._backend.kind == "model" and not self.trouble:
            self._thread.join(MODEL_PATIENCE * seconds)  # it is our own work that takes so long
        if self._thread.is_alive():
            self.trouble = self.trouble or "it is slow or does not answer"
        self._stop.set()  # from now on the thread prints nothing and begins nothing
        self._thread.join(0.1)

    def _run(self) -> None:
        pause = 0.0
        with self._lock:
            while not self._stop.is_set():
                closing = self._closing.is_set()
                try:
                    self._send()
                except Exception as error:  # whatever the server does, the run goes on
                    self.trouble = short_reason(error)
                    if not self._warned and not self._stop.is_set():
                        self._warned, more = True, "the run goes on, and the rest is sent later"
                        logger.log(NOTICE, f"tracking at {self.state.uri}: {self.trouble}; {more}")
                    pause = min(max(PATIENCE[0], 2 * pause), PATIENCE[0] if closing else PATIENCE[1])
                else:
                    self.trouble, pause = "", INTERVAL
                    if closing:
                        return
                finally:
                    self.answered.set()
                (self._stop if closing else self._closing).wait(pause)

    def _send(self) -> None:
        if self._backend is None:
            self._lock.close()
            self._lock.enter_context(event_log.upload_lock(self._path))
            header = event_log.read_header(self._path)
            # Once more: a replay may have held the lock until now.
            self.state = UploadState.load(self._path, header, self.state.uri)
            self.state.save(self._path)
            self._backend = MLflowBackend(self.state, header, self._path.parent)
        upload(self._path, self.state, self._backend, self._stop.is_set)


def replay(path: Path, uri: str | None = None, new_run: bool = False) -> None:
    """Send what a run's server has missed, nothing twice.

    A run that was killed and not resumed ends as KILLED.

    Args:
        path: a run folder, or its event log.
        uri: another server, which gets everything.
        new_run: send everything to a new run.

    Raises:
        InputError: there is no such log, or a live run is sending it.
        RunError: the server does not answer, or the run was deleted.
    """
    path = path / event_log.NAME if path.is_dir() else path
    header = event_log.read_header(path)
    with event_log.upload_lock(path):
        state = UploadState.load(path, header)
        uri = absolute(uri or state.uri)
        if new_run or uri != state.uri:
            state = UploadState(state.run, uri)
        try:
            backend = MLflowBackend(state, header, path.parent)
            sent = upload(path, state, backend)
            killed = event_log.time_of_kill(path)
            if killed is not None:
                backend.terminate("KILLED", killed)
        except InputError:
            raise
        except Exception as error:
            raise RunError(
                f"tracking at {state.uri}: {short_reason(error)}; {path} is sent up to event {state.number}, so mend "
                f"that and start the same command again"
            ) from error
    done = f"sent {sent} events" if sent else "nothing was missing"
    ended = " ended as KILLED" if killed is not None else ""
    logger.info("%s: %s; run %s at %s%s", path, done, state.run_id, state.uri, ended)
