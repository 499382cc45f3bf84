"""MLflow: the one module that imports it. A ``Store`` puts the calls of one spool into one MLflow run.

Nothing is there twice, however often a call is sent: MLflow keeps a metric with the same name, step, time and value
once, parameters and tags by name, data sets by name and digest, and the run itself is found by its local id.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dist_obdsd.errors import RunError
from dist_obdsd.tracking.event_log import BATCH, LOCAL, Call, State

LOCAL_ID = "dist_obdsd.local_id"
LOGGED_MODEL = "dist_obdsd.models"  # the checkpoint that was logged as a model
SMALL_BATCH = 100  # parameters or tags that MLflow takes in one call
KEY, PARAM, TAG, DIGEST = 250, 6000, 8000, 36  # the longest that MLflow takes, in characters
_ODD = re.compile(r"[^\w\-. :/]")
_REFUSALS = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE", "BAD_REQUEST")


class GoneError(RunError):
    """The run or its experiment was deleted, so that trying again is of no use."""


def load_libraries(uri: str) -> None:
    """Import what a store there needs: seconds of work, and not in a thread while others fork.

    Raises:
        ImportError: MLflow is not installed.
    """
    # Its own patience is minutes per call, and whoever calls here tries again.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    import mlflow.tracking

    # What it would say while it saves a model, in the middle of a run's own lines.
    logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)
    if not uri.startswith(("http://", "https://")):
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401

        # It prints a traceback for each failure that is told here in a line.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def absolute(uri: str) -> str:
    """The same store from any working folder."""
    relative = uri.removeprefix("sqlite:///")
    if relative in (uri, "") or relative.startswith(("/", ":", "file:")):
        return uri
    return f"sqlite:///{Path(relative).absolute()}"


def check(uri: str) -> None:
    """Raises whatever MLflow raises where no store answers."""
    load_libraries(uri)
    from mlflow.tracking import MlflowClient

    MlflowClient(tracking_uri=uri).search_experiments(max_results=1)


def reason(error: BaseException) -> str:
    """Why a call failed, in a line."""
    text = " ".join(str(error).split()) or type(error).__name__
    # urllib3 and SQLAlchemy wrap the cause into several layers of which the innermost says it.
    found = re.search(
        r"Connection refused|timed out|Name or service not known|No route to host|readonly database|database is locked"
        r"|unable to open database file",
        text,
    )
    return found[0] if found else re.split(r"[.;] ", text)[0][:160]


def metric_name(name: str) -> str:
    """MLflow's names allow no "@", which the field's metrics have, and little else but letters."""
    return _ODD.sub("_", name.replace("@", "_at_"))[:KEY]


class Store:
    """Where the calls of a spool go to."""

    def __init__(self, state: State, head: Mapping[str, Any], folder: Path, warn: Callable[[str], None]) -> None:
        """
        Args:
            state: whose ``uri`` is asked, and whose ``run_id`` is set when there is a run.
            head: the spool's first line.
            folder: that artifacts are relative to.
            warn: is told what MLflow does not take, once for each kind of call.
        """
        from mlflow.tracking import MlflowClient

        self._state, self._head, self._folder, self._warn = state, head, folder, warn
        self._client = MlflowClient(tracking_uri=state.uri)
        self._warned: set[str] = set()
        self.kind = ""
        """Of the calls that are being sent, or were last."""

    def send(self, calls: list[Call]) -> None:
        """Send calls of one kind.

        Raises:
            GoneError: the run or its experiment was deleted.
            Exception: whatever else MLflow raises; it may pass, so send them again.
        """
        from mlflow.exceptions import MlflowException

        kind = self.kind = calls[0]["kind"]
        try:
            if self._state.run_id is None:
                self._state.run_id = self._find(self._head["run"]) or self._create(calls[0])
            getattr(self, f"_{kind}")(self._state.run_id, calls)
        except MlflowException as error:
            if error.error_code not in _REFUSALS or self._state.run_id is None:
                raise
            self._check_run(self._state.run_id)
            self._left_out(kind, reason(error))

    def terminate(self, status: str, time: int) -> None:
        """End the run; ``time`` in milliseconds since 1970."""
        if self._state.run_id is not None:
            self._client.set_terminated(self._state.run_id, status=status, end_time=time)

    def _left_out(self, kind: str, why: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            self._warn(f"tracking at {self._state.uri} does not take {kind} ({why}); the rest goes there")

    # ---- the run ----------------------------------------------------------------------------------------------------

    def _experiment(self) -> str:
        name = self._head["config"]["tracking"]["experiment"]
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            return self._client.create_experiment(name)
        if experiment.lifecycle_stage != "active":
            raise GoneError(
                f"the experiment {name!r} was deleted; restore it with mlflow experiments restore --experiment-id "
                f"{experiment.experiment_id}, or set tracking.experiment"
            )
        return experiment.experiment_id

    def _find(self, local: str) -> str | None:
        """The run with a local id, if there is one: a call that made it may have got no answer."""
        wanted = f"tags.`{LOCAL_ID}` = '{local}'"
        found = self._client.search_runs([self._experiment()], filter_string=wanted, max_results=1)
        return found[0].info.run_id if found else None

    def _create(self, call: Call) -> str:
        tags = {LOCAL_ID: self._head["run"]}
        parent = self._head["config"]["tracking"]["parent"]
        if parent is not None and parent.startswith(LOCAL):  # whoever started this one did not know more
            parent = self._find(parent)
        if parent:
            tags["mlflow.parentRunId"] = parent
        name = self._head["config"]["name"]
        return self._client.create_run(self._experiment(), call["time"], tags, run_name=name).info.run_id

    def _check_run(self, run_id: str) -> None:
        from mlflow.exceptions import MlflowException

        again = "and `dist-obdsd replay` sends what is missing"
        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise GoneError(f"there is no run {run_id}; `dist-obdsd replay --new-run` makes another {again}") from error
        if run.info.lifecycle_stage != "active":
            raise GoneError(f"the run {run_id} was deleted; mlflow runs restore --run-id {run_id} {again}")

    # ---- a method per kind of call ----------------------------------------------------------------------------------

    def _start(self, run_id: str, calls: list[Call]) -> None:
        self._client.update_run(run_id, status="RUNNING")
        tags = dict(calls[0]["tags"])
        if tags.get("git_commit", "unknown") != "unknown":
            tags["mlflow.source.git.commit"] = tags["git_commit"]  # what the UI shows
        self._tags(run_id, [{"values": tags}])

    def _tags(self, run_id: str, calls: list[Call]) -> None:
        from mlflow.entities import RunTag

        for part in _cut(calls[0]["values"].items(), SMALL_BATCH):
            self._client.log_batch(run_id, tags=[RunTag(name[:KEY], value[:TAG]) for name, value in part])

    def _params(self, run_id: str, calls: list[Call]) -> None:
        from mlflow.entities import Param

        for part in _cut(calls[0]["values"].items(), SMALL_BATCH):
            params = [Param(metric_name(name), value[:PARAM]) for name, value in part]
            self._client.log_batch(run_id, params=params)

    def _metrics(self, run_id: str, calls: list[Call]) -> None:
        from mlflow.entities import Metric

        rows = [
            Metric(metric_name(name), value, call["time"], call["step"])
            for call in calls
            for name, value in call["values"].items()
        ]
        for part in _cut(rows, BATCH):
            self._client.log_batch(run_id, metrics=part)

    def _dataset(self, run_id: str, calls: list[Call]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        told = calls[0]
        source, profile = json.dumps({"uri": told["source"], "sha256": told["digest"]}), json.dumps(told["profile"])
        dataset = Dataset(told["name"][:KEY], told["digest"][:DIGEST], "local", source, profile=profile)
        self._client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])

    def _artifact(self, run_id: str, calls: list[Call]) -> None:
        path = self._folder / calls[0]["path"]
        try:
            if path.is_dir():
                self._client.log_artifacts(run_id, str(path), path.name)
            else:
                self._client.log_artifact(run_id, str(path))
        except Exception as error:
            # Files may have a store of their own, and metrics must not wait for it. A dead server fails here, too.
            self._check_run(run_id)
            self._left_out(f"the artifact {path.name}", reason(error))

    def _model(self, run_id: str, calls: list[Call]) -> None:
        path = self._folder / calls[0]["path"]
        if self._client.get_run(run_id).data.tags.get(LOGGED_MODEL) == path.name:
            return
        from dist_obdsd.tracking.mlflow_model import log_model

        try:
            log_model(self._client, run_id, path)
            self._client.set_tag(run_id, LOGGED_MODEL, path.name)
        except Exception as error:  # as of an artifact
            self._check_run(run_id)
            self._left_out(f"the model {path.name}", reason(error))

    def _end(self, run_id: str, calls: list[Call]) -> None:
        self.terminate(calls[0]["status"], calls[0]["time"])


def _cut(rows: Iterable[Any], size: int) -> Iterable[list[Any]]:
    listed = list(rows)
    return (listed[start : start + size] for start in range(0, len(listed), size))
