"""Who sends a spool: the thread of a live run, and ``replay`` afterwards."""

import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from dist_obdsd.errors import InputError, RunError
from dist_obdsd.tracking import event_log as spools
from dist_obdsd.tracking.event_log import State
from dist_obdsd.tracking.mlflow_backend import GoneError, Store, absolute, load_libraries, reason

INTERVAL = 2.0  # seconds between two looks into the spool
MODEL_PATIENCE = 5  # a model, which has to be made first, may take so many times longer
PATIENCE = (1.0, 60.0)  # seconds from a failure to the next attempt: doubled from the first to the second


def deliver(path: Path, state: State, store: Store, stop: Callable[[], bool] = lambda: False) -> int:
    """Send what is missing, and remember after every batch what the server has taken.

    Returns:
        How many calls were sent.

    Raises:
        GoneError: the run was deleted.
        Exception: the server does not answer; the rest is still missing.
    """
    sent = 0
    for calls, end in spools.batches(path, state.sent):
        if stop():
            break
        store.send(calls)
        sent += len(calls)
        state.sent, state.number = end, calls[-1]["n"]
        state.save(path)
    return sent


class Writer:
    """A thread that sends the spool of a live run.

    The spool itself is the queue: the thread reads on from where the server is, so that nothing waits in memory, and
    whoever appends knows nothing of the thread.
    """

    def __init__(self, path: Path, state: State, uri: str, say: Callable[[str], None]) -> None:
        """
        Args:
            state: as it is on the disk; the thread alone changes it from now on.
            say: is told the first failure.
        """
        self.state, self.trouble = state, ""
        self._path, self._uri, self._say = path, uri, say
        self._held = ExitStack()
        self._store: Store | None = None
        self._told = False
        self._wake, self._closing, self._stop = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        self._thread.start()

    def close(self, seconds: float) -> None:
        """Send what is left, for at most so long. ``trouble`` says what was in the way."""
        self._closing.set()
        self._wake.set()
        self._thread.join(seconds)
        if self._store is not None and self._store.kind == "model" and not self.trouble:
            self._thread.join(MODEL_PATIENCE * seconds)  # it is our own work that takes so long
        if self._thread.is_alive():
            self.trouble = self.trouble or "it is slow or does not answer"
        self._stop.set()  # from now on the thread prints nothing and begins nothing
        self._wake.set()
        self._thread.join(0.1)

    def _run(self) -> None:
        pause = 0.0
        with self._held:
            while not self._stop.is_set():
                closing = self._closing.is_set()
                try:
                    self._once()
                except GoneError as error:
                    self._tell(f"{error}; the run goes on")
                    self._closing.wait()  # a replay now would meet a run that is still being written
                    return
                except Exception as error:  # whatever the store does, the run goes on
                    self._tell(f"{reason(error)}; the run goes on, and what is missing there is sent when it answers")
                    pause = min(max(PATIENCE[0], 2 * pause), PATIENCE[0] if closing else PATIENCE[1])
                else:
                    self.trouble, pause = "", INTERVAL
                    if closing:
                        return
                self._wake.wait(pause)
                self._wake.clear()

    def _once(self) -> None:
        if self._store is None:
            self._held.close()
            self._held.enter_context(spools.sending(self._path))
            head = spools.read_head(self._path)
            self.state = State.load(self._path, head)  # a replay may have held the spool until now
            if self.state.uri != self._uri:
                self.state.forget(self._uri)  # another server gets all that there is
            self.state.save(self._path)
            self._store = Store(self.state, head, self._path.parent, self._warn)
        deliver(self._path, self.state, self._store, self._stop.is_set)

    def _tell(self, trouble: str) -> None:
        self.trouble = trouble.partition(";")[0]
        if not self._told:
            self._told = True
            self._warn(f"tracking at {self._uri}: {trouble}")

    def _warn(self, text: str) -> None:
        if not self._stop.is_set():
            self._say(text)


def replay(path: Path, uri: str | None, new_run: bool, say: Callable[[str], None]) -> None:
    """Send what a run's server has missed, nothing twice.

    A run that was killed and not started again ends as KILLED.

    Args:
        path: a run folder, or its spool.
        uri: another server, which gets all of it.
        new_run: send all of it to a new run.

    Raises:
        InputError: there is no such spool, or a live run is sending it.
        RunError: the server does not answer, or the run was deleted.
    """
    path = path / spools.NAME if path.is_dir() else path
    head = spools.read_head(path)
    with spools.sending(path):
        state = State.load(path, head)
        wanted = absolute(uri) if uri else state.uri
        if new_run or wanted != state.uri:
            state.forget(wanted)
        try:
            load_libraries(state.uri)
            store = Store(state, head, path.parent, say)
            sent = deliver(path, state, store)
            killed = spools.unfinished(spools.calls(path, 0))
            if killed is not None:
                store.terminate("KILLED", killed)
        except (InputError, GoneError):
            raise
        except Exception as error:
            raise RunError(
                f"tracking at {state.uri}: {reason(error)}; {path} is sent up to call {state.number}, so mend that and "
                f"start the same command again"
            ) from error
    done = f"sent {sent} calls" if sent else "nothing was missing"
    say(f"{path}: {done}; run {state.run_id} at {state.uri}" + (" ended as KILLED" if killed is not None else ""))
