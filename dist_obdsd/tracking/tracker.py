"""Experiment tracking. A rank that does not log has a ``Tracker``, which does nothing; rank 0 may have MLflow's."""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dist_obdsd import config


class Tracker:
    """The null tracker: every call is accepted and nothing happens."""

    run_id: str | None = None

    def params(self, values: Mapping[str, Any]) -> None:
        """Log settings once, by dotted name."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers at an optimizer step. They may be sent later."""

    def artifact(self, path: Path) -> None:
        """Log a file."""

    def model(self, checkpoint: Path) -> None:
        """Log a checkpoint as a model that MLflow can load and serve."""

    def close(self, status: str) -> None:
        """Send what is waiting and end the run as FINISHED, FAILED or KILLED."""


class MLflowTracker(Tracker):
    """One MLflow run. The first failure is told once and ends tracking, never training: metrics.jsonl has it all."""

    def __init__(
        self,
        settings: config.Tracking,
        name: str,
        run_id: str | None,
        tags: Mapping[str, str],
        warn: Callable[[str], None],
    ) -> None:
        """Start a run, or continue the one called ``run_id``."""
        # An unreachable server must be given up after seconds; MLflow's own patience is minutes per call.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        self._warn = warn
        self._waiting: list[Any] = []
        self._alive = True
        self._uri = settings.uri
        self._every = settings.every_steps
        self._guarded(lambda: self._open(settings, name, run_id, tags))

    def _open(self, settings: config.Tracking, name: str, run_id: str | None, tags: Mapping[str, str]) -> None:
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=settings.uri)
        if run_id is not None:
            self._client.update_run(run_id, status="RUNNING")
            self.run_id = run_id
            return
        experiment = self._client.get_experiment_by_name(settings.experiment)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(settings.experiment)
        self.run_id = self._client.create_run(experiment_id, run_name=name, tags=dict(tags)).info.run_id

    def params(self, values: Mapping[str, Any]) -> None:
        if not self._alive:
            return
        from mlflow.entities import Param

        entries = [Param(key, str(value)) for key, value in values.items()]
        self._guarded(lambda: self._client.log_batch(self.run_id, params=entries))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        if not self._alive:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        # MLflow's names allow no "@", which the field's metrics have.
        self._waiting += [Metric(key.replace("@", "_at_"), value, now, step) for key, value in values.items()]
        if len(self._waiting) >= 10 * self._every:
            self._flush()

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        for start in range(0, len(waiting), 1000):  # MLflow takes at most 1000 metrics a call
            batch = waiting[start : start + 1000]
            self._guarded(lambda batch=batch: self._client.log_batch(self.run_id, metrics=batch))  # type: ignore[misc]

    def artifact(self, path: Path) -> None:
        self._guarded(lambda: self._client.log_artifact(self.run_id, str(path)))

    def model(self, checkpoint: Path) -> None:
        if not self._alive or self.run_id is None:
            return
        from dist_obdsd.tracking.model import log_model

        run_id = self.run_id
        self._guarded(lambda: log_model(self._client, run_id, checkpoint))

    def close(self, status: str) -> None:
        self._flush()
        self._guarded(lambda: self._client.set_terminated(self.run_id, status=status))

    def _guarded(self, call: Callable[[], Any]) -> None:
        if not self._alive:
            return
        try:
            call()
        except Exception as error:  # whatever the store does, the run goes on
            self._alive = False
            reason = " ".join(str(error).split())[:200]
            self._warn(f"tracking at {self._uri} stopped ({reason}); the run goes on, metrics.jsonl has every number")


def build_tracker(
    settings: config.Tracking,
    name: str,
    run_id: str | None,
    tags: Mapping[str, str],
    is_main: bool,
    warn: Callable[[str], None],
) -> Tracker:
    """MLflow on the main rank if it is asked for, else the null tracker."""
    if settings.kind == "none" or not is_main:
        return Tracker()
    return MLflowTracker(settings, name, run_id, tags, warn)
