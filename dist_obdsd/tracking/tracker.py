"""Experiment tracking. A rank that does not log has a ``Tracker``, which does nothing; rank 0 may have MLflow's."""

import itertools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dist_obdsd.config import Config
from dist_obdsd.errors import InputError, UserError
from dist_obdsd.tracking import event_log as spools
from dist_obdsd.tracking.event_log import Spool, State
from dist_obdsd.tracking.mlflow_backend import absolute, load_libraries
from dist_obdsd.tracking.uploader import Writer


class Tracker:
    """The null tracker: every call is accepted and nothing happens."""

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run, or a local one (``local-...``) until the server was reached."""
        return None

    def reach(self) -> str | None:
        """``run_id`` after a wait, of at most ``tracking.wait_seconds``, for the server to give one."""
        return self.run_id

    def params(self, values: Mapping[str, Any]) -> None:
        """Log settings by dotted name. One that was logged before stays as it is."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers at an optimizer step. What a metric was at a step that is done again stays as it is."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Log texts that may change."""

    def dataset(self, name: str, digest: str, source: str, profile: Mapping[str, Any]) -> None:
        """Log what the run is trained on."""

    def artifact(self, path: Path) -> None:
        """Log a file, or a folder under its name. It is read when it is sent, and must stay until then."""

    def model(self, checkpoint: Path) -> None:
        """Log a checkpoint as a model that MLflow can load and serve."""

    def close(self, status: str) -> None:
        """Send what is waiting, for a while, and end the run as FINISHED, FAILED or KILLED."""


class MLflowTracker(Tracker):
    """One MLflow run. A call is a line in the spool; a thread sends it, now or later or never, and no call waits."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        manifest: str,
        run_id: str | None,
        tags: Mapping[str, str],
        say: Callable[[str], None],
    ) -> None:
        """Start a run, or continue the one in the run folder.

        Args:
            folder: for the spool.
            manifest: digest of the shards' manifest.
            run_id: what a checkpoint says that this run is called.
        """
        self._settings, self._say, self._wait = config.tracking, say, config.tracking.wait_seconds
        self._id = run_id
        self._spool: Spool | None = None
        self._writer: Writer | None = None
        uri = absolute(config.tracking.uri)
        try:
            self._spool, state = _open(config, folder, manifest, run_id, uri, say)
            self._id = state.run_id or state.run
            self._spool.append("start", tags=dict(tags))
            load_libraries(uri)
            self._writer = Writer(self._spool.path, state, uri, say)
        except ImportError as error:
            say(f"tracking: {error}; pip install mlflow, and `dist-obdsd replay {folder}` sends this run")
        except (OSError, UserError) as error:
            self._give_up(error)

    @property
    def run_id(self) -> str | None:
        return self._writer.state.run_id or self._id if self._writer else self._id

    def reach(self) -> str | None:
        deadline = time.monotonic() + self._wait
        while self._writer and not self._writer.state.run_id and not self._writer.trouble:
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        return self.run_id

    def params(self, values: Mapping[str, Any]) -> None:
        self._guarded(lambda spool: spool.params(values))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self._guarded(lambda spool: spool.metrics(values, step))

    def tags(self, values: Mapping[str, str]) -> None:
        self._guarded(lambda spool: spool.append("tags", values=dict(values)))

    def dataset(self, name: str, digest: str, source: str, profile: Mapping[str, Any]) -> None:
        told = {"name": name, "digest": digest, "source": source, "profile": dict(profile)}
        self._guarded(lambda spool: spool.append("dataset", **told))

    def artifact(self, path: Path) -> None:
        self._guarded(lambda spool: spool.append("artifact", path=_within(spool, path)))

    def model(self, checkpoint: Path) -> None:
        self._guarded(lambda spool: spool.append("model", path=_within(spool, checkpoint)))

    def close(self, status: str) -> None:
        self._guarded(lambda spool: spool.append("end", status=status))
        if self._spool is not None:
            self._spool.close()
        if self._writer is None:
            return
        self._writer.close(self._wait)
        if self._spool is not None and (missing := self._spool.number - self._writer.state.number):
            self._say(
                f"tracking at {self._settings.uri} lacks {missing} of {self._spool.number} calls "
                f"({self._writer.trouble}); `dist-obdsd replay {self._spool.path.parent}` sends the rest"
            )

    def _guarded(self, append: Callable[[Spool], None]) -> None:
        if self._spool is None:
            return
        try:
            append(self._spool)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if self._spool is not None:
            self._spool.close()
        self._spool = None
        reason = getattr(error, "strerror", None) or error
        self._say(
            f"tracking stopped, since its spool cannot be written ({reason}); the run goes on, metrics.jsonl has it"
        )


def _within(spool: Spool, path: Path) -> str:
    """A path from the spool's folder where it is inside, since that may be moved; else absolute."""
    folder, whole = spool.path.parent.absolute(), path.absolute()
    return str(whole.relative_to(folder) if whole.is_relative_to(folder) else whole)


def _open(
    config: Config, folder: Path, manifest: str, run_id: str | None, uri: str, say: Callable[[str], None]
) -> tuple[Spool, State]:
    """The run's spool, a new one if there is none or if it is another run's.

    Raises:
        OSError, UserError: it cannot be written.
    """
    path = folder / spools.NAME
    dumped = config.model_dump(mode="json")
    if path.exists() and path.stat().st_size:
        try:
            head = spools.read_head(path)
            other = spools.whose(head, dumped, manifest)
            if not other:
                return Spool(path, head), State.load(path, head)
        except InputError as error:
            other = str(error)
        aside = next(to for n in itertools.count(1) if not (to := path.with_name(f"tracking-{n}.jsonl")).exists())
        path.rename(aside)
        if State.path(path).exists():
            State.path(path).rename(State.path(aside))
        say(f"tracking: {path} is not of this run ({other}), so it is kept as {aside.name} and a new one begins")
    local = run_id if run_id is not None and run_id.startswith(spools.LOCAL) else None
    head = spools.new_head(uri, dumped, manifest, local)
    state = State(head["run"], uri, None if local else run_id)
    state.save(path)
    return Spool(path, head), state


def build_tracker(
    config: Config,
    folder: Path,
    manifest: str,
    run_id: str | None,
    tags: Mapping[str, str],
    is_main: bool,
    say: Callable[[str], None],
) -> Tracker:
    """MLflow on the main rank if it is asked for, else the null tracker. The arguments are ``MLflowTracker``'s."""
    if config.tracking.kind == "none" or not is_main:
        return Tracker()
    return MLflowTracker(config, folder, manifest, run_id, tags, say)
