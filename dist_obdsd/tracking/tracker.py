"""Experiment tracking as a run sees it."""

import itertools
import logging
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_obdsd.config import Config, changed_settings
from dist_obdsd.console import NOTICE
from dist_obdsd.errors import InputError, UserError
from dist_obdsd.tracking import event_log
from dist_obdsd.tracking.event_log import EventLog, UploadState
from dist_obdsd.tracking.mlflow_backend import absolute, load_libraries
from dist_obdsd.tracking.uploader import Uploader

logger = logging.getLogger(__name__)


class Tracker:
    """Logs a run to MLflow: a call writes an event, and a thread sends it.

    Without arguments it does nothing, as on all ranks but rank 0.
    """

    def __init__(
        self, log: EventLog | None = None, uploader: Uploader | None = None, run_id: str | None = None,
        wait_seconds: float = 0.0,
    ) -> None:  # fmt: skip
        self._log, self.uploader, self._id, self._wait = log, uploader, run_id, wait_seconds

    @property
    def run_id(self) -> str | None:
        """MLflow's id, or a local one (``local-...``) until the server was reached."""
        return self.uploader.state.run_id or self._id if self.uploader else self._id

    def await_run_id(self) -> str | None:
        """Return ``run_id`` after at most ``wait_seconds`` for the server to give it."""
        if self.uploader and not self.uploader.state.run_id:
            self.uploader.answered.wait(self._wait)
        return self.run_id

    def params(self, values: Mapping[str, Any]) -> None:
        """Log settings by dotted name. One that was logged before stays as it is."""
        self._append("params", values={name: str(value) for name, value in values.items()})

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers at a step; those of a step that is done again stay as they are."""
        self._append("metrics", step=step, values={name: float(value) for name, value in values.items()})

    def tags(self, values: Mapping[str, str]) -> None:
        """Log texts that may change."""
        self._append("tags", values=dict(values))

    def dataset(self, name: str, digest: str, source: str, profile: Mapping[str, Any]) -> None:
        """Log the data that the run is trained on."""
        self._append("dataset", name=name, digest=digest, source=source, profile=dict(profile))

    def artifact(self, path: Path) -> None:
        """Log a file or folder. It is read when it is sent, and must stay until then."""
        self._append("artifact", path=path)

    def model(self, checkpoint: Path) -> None:
        """Log a checkpoint as a model that MLflow can load and serve."""
        self._append("model", path=checkpoint)

    def close(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED; wait ``wait_seconds`` at most."""
        self._append("end", status=status)
        if self._log is not None:
            self._log.close()
        if self.uploader is None:
            return
        self.uploader.close(self._wait)
        if self._log is not None and (missing := self._log.number - self.uploader.state.number):
            logger.log(
                NOTICE,
                f"tracking at {self.uploader.state.uri} lacks {missing} of {self._log.number} events "
                f"({self.uploader.trouble}); `dist-obdsd replay {self._log.path.parent}` sends the rest",
            )

    def _append(self, kind: str, **fields: Any) -> None:
        if self._log is None:
            return
        if "path" in fields:  # from the run folder where it is inside, since that may be moved
            folder, path = self._log.path.parent.absolute(), fields["path"].absolute()
            fields["path"] = str(path.relative_to(folder) if path.is_relative_to(folder) else path)
        try:
            self._log.append(kind, **fields)
        except OSError as error:
            self._log.close()
            self._log = None
            _log_failure(error)


def build_tracker(config: Config, folder: Path, manifest: str, run_id: str | None, tags: Mapping[str, str]) -> Tracker:
    """Start or continue tracking a run; the null tracker where it is not wanted.

    Args:
        folder: the run folder, for the event log.
        manifest: digest of the shards' manifest.
        run_id: the run's id in the checkpoint that it resumes from.
    """
    if config.tracking.kind == "none":
        return Tracker(run_id=run_id)
    uri = absolute(config.tracking.uri)
    try:
        log, state = _open(config, folder, manifest, run_id, uri)
        log.append("start", tags=dict(tags))
    except (OSError, UserError) as error:
        _log_failure(error)
        return Tracker(run_id=run_id)
    uploader = None
    try:
        load_libraries(uri)
        uploader = Uploader(log.path, state)
    except ImportError as error:
        logger.log(NOTICE, f"tracking: {error}; pip install mlflow, and `dist-obdsd replay {folder}` sends this run")
    return Tracker(log, uploader, state.run_id or state.run, config.tracking.wait_seconds)


def _open(config: Config, folder: Path, manifest: str, run_id: str | None, uri: str) -> tuple[EventLog, UploadState]:
    """Open the run's event log; one of another run is kept under another name."""
    path = folder / event_log.NAME
    dumped = config.model_dump(mode="json")
    if path.exists() and path.stat().st_size:
        try:
            header = event_log.read_header(path)
            changes = changed_settings(header["config"], dumped)
            changes += ["other shards"] * (header["manifest"] != manifest)
            if not changes:
                log, state = EventLog(path, header), UploadState.load(path, header, uri)
                state.save(path)  # before the log grows, of which a power cut may have taken the last lines
                return log, state
        except InputError as error:
            changes = [str(error)]
        aside = next(to for n in itertools.count(1) if not (to := path.with_name(f"tracking-{n}.jsonl")).exists())
        path.rename(aside)
        if (sent := UploadState.path(path)).exists():
            sent.rename(UploadState.path(aside))
        differs = "; ".join(changes)
        logger.log(NOTICE, f"tracking: {path} is not of this run ({differs}), so it is kept as {aside.name}")
    state = UploadState(event_log.LOCAL + uuid.uuid4().hex, uri, run_id)
    if run_id is not None and run_id.startswith(event_log.LOCAL):
        state = UploadState(run_id, uri)
    state.save(path)
    header = {"format": event_log.FORMATS[0], "run": state.run, "uri": uri, "config": dumped, "manifest": manifest}
    return EventLog(path, header), state


def _log_failure(error: Exception) -> None:
    reason = getattr(error, "strerror", None) or error
    logger.log(
        NOTICE, f"tracking stopped, since its event log cannot be written ({reason}); metrics.jsonl has the numbers"
    )
