"""MLflow: the one module that imports it.

``MLflowBackend`` puts the events of one log into one MLflow run. Events that are sent again change nothing.
MLflow keeps a metric with the same name, step, time and value once, parameters and tags by name, and data sets by name
and digest. The run itself is found by its local id.
"""

import contextlib
import fcntl
import importlib
import json
import logging
import os
import re
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dist_obdsd.console import NOTICE
from dist_obdsd.errors import RunError
from dist_obdsd.tracking.event_log import LOCAL, Event, UploadState

LOCAL_ID = "dist_obdsd.local_id"
LOGGED_MODEL = "dist_obdsd.models"  # the checkpoint that was logged as a model
AT_ONCE = {"metrics": 1000, "params": 100, "tags": 100}  # that MLflow takes in one call
KEY, PARAM, TAG, DIGEST = 250, 6000, 8000, 36  # MLflow's limits, in characters
CHARTS = (
    (r"(ranking\w*|distillation)", r"curves/loss_\1"),
    (r"validation/(.*)", r"curves/validation_\1"),
    (r"(lr|ramp|grad_norm|masked|anchors)", r"optimizer/\1"),
    (r"(seconds|data_wait)", r"speed/step_\1"),
    (r"epoch/(.*)", r"speed/epoch_\1"),
    (r"target_(.*)", r"target/\1"),
    (r"checkpoint/(.*)", r"checkpoint_\1"),
)
"""A metric's name in a run, and in MLflow. Its UI makes a section of charts for each part before the last slash, in the
order of the alphabet, and shows what has none at the end."""
REFUSALS = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE", "BAD_REQUEST")
"""Error codes with which MLflow refuses a value for good, or one whose run was deleted."""
CAUSES = re.compile(
    r"Connection refused|timed out|Name or service not known|No route to host|readonly database|database is locked"
    r"|unable to open database file"
)
"""Texts of urllib3 and SQLAlchemy's innermost errors, which they wrap in several layers."""

logger = logging.getLogger(__name__)


def load_libraries(uri: str) -> None:
    """Import MLflow, which takes seconds and must not happen while others fork.

    Raises:
        ImportError: MLflow is not installed.
    """
    # Its own patience is minutes per call, and whoever calls here tries again.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    import mlflow.tracking

    logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)  # it talks while it saves a model
    if not uri.startswith(("http://", "https://")):
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401

        # It prints a traceback for each failure that is logged here in a line.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def absolute(uri: str) -> str:
    """Return a URI that means the same from any working folder."""
    relative = uri.removeprefix("sqlite:///")
    if relative in (uri, "") or relative.startswith(("/", ":", "file:")):
        return uri
    if relative.startswith("~"):
        return f"sqlite:///{Path(relative).expanduser()}"
    # The folder may be called what?now; the rest is the user's, perhaps with options after a "?".
    return f"sqlite:///{quote(str(Path.cwd()))}/{relative}"


def connect(uri: str) -> Any:
    """Return an MLflow client that has been answered.

    Raises:
        Exception: whatever MLflow or SQLite raise where there is no server, or no file that can be a database.
    """
    load_libraries(uri)
    from mlflow.tracking import MlflowClient
    from sqlalchemy.engine import make_url

    with contextlib.ExitStack() as stack:
        path = make_url(uri).database if uri.startswith("sqlite:") else None
        if path and not path.startswith(("file:", ":")):
            with contextlib.closing(sqlite3.connect(path)) as file:  # fails at once; MLflow would try for a minute
                file.execute("PRAGMA user_version")
            folder = os.open(Path(path).parent, os.O_RDONLY)
            stack.callback(os.close, folder)
            with contextlib.suppress(OSError):  # some network file systems cannot lock a folder
                fcntl.flock(folder, fcntl.LOCK_EX)  # processes that make the tables at once ruin them
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    return client


def short_reason(error: BaseException) -> str:
    """Say in a line why a call failed."""
    text = " ".join(str(error).split()) or type(error).__name__
    found = CAUSES.search(text)
    return found[0] if found else re.split(r"[.;] ", text)[0][:160]


def metric_name(name: str) -> str:
    """Return the name of a metric in MLflow."""
    for pattern, chart in CHARTS:
        if match := re.fullmatch(pattern, name):
            return _key(match.expand(chart))
    return _key(name)


def _key(name: str) -> str:
    """Return a name that MLflow takes, which allows neither "@" nor "("."""
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"))[:KEY]


class MLflowBackend:
    """Sends the events of one log to one MLflow run, which it finds or makes."""

    def __init__(self, state: UploadState, header: Mapping[str, Any], folder: Path) -> None:
        """Connect to ``state.uri``; artifacts have paths from the run ``folder``."""
        self._state, self._header, self._folder = state, header, folder
        self._client = connect(state.uri)
        self._entities = importlib.import_module("mlflow.entities")
        self._warned: set[str] = set()
        self.kind = ""
        """Kind of the events that are being sent, or were last."""

    def send(self, events: list[Event]) -> None:
        """Send events of one kind; after an exception they can be sent again."""
        kind = self.kind = events[0]["kind"]
        is_file = kind in ("artifact", "model")
        try:
            if self._state.run_id is None:
                self._state.run_id = self._find(self._header["run"]) or self._create(events[0])
            getattr(self, f"_{kind}")(self._state.run_id, *events)
        except Exception as error:
            # Files may have a store of their own, and metrics must not wait for it.
            refused = is_file or getattr(error, "error_code", None) in REFUSALS
            if not refused or self._state.run_id is None:
                raise
            self._leave_out(f"the {kind} {Path(events[0]['path']).name}" if is_file else kind, error)

    def terminate(self, status: str, time: int) -> None:
        """End the run; ``time`` in milliseconds since 1970."""
        self._client.set_terminated(self._state.run_id, status=status, end_time=time)

    def _leave_out(self, what: str, error: Exception) -> None:
        """Go on without what MLflow refused, unless the run is gone or the server away."""
        run = self._client.get_run(self._state.run_id)
        if run.info.lifecycle_stage != "active":
            restore = f"mlflow runs restore --run-id {self._state.run_id}"
            raise RunError(f"the run was deleted: {restore}, then `dist-obdsd replay`, or `replay --new-run`")
        if what not in self._warned:
            self._warned.add(what)
            uri, reason = self._state.uri, short_reason(error)
            logger.log(NOTICE, f"tracking at {uri} does not take {what} ({reason}); the rest goes there")

    def _experiment(self) -> str:
        name = self._header["config"]["tracking"]["experiment"]
        experiment = self._client.get_experiment_by_name(name)
        if experiment is not None:
            return experiment.experiment_id
        # MLflow would read a folder called job%2Fmain as job/main.
        quoted = self._state.uri.startswith("sqlite:") and "%" in str(Path.cwd())
        return self._client.create_experiment(name, Path("mlruns").absolute().as_uri() if quoted else None)

    def _find(self, local: str) -> str | None:
        """Find the run with a local id: a call that made it may have got no answer."""
        query = f"tags.`{LOCAL_ID}` = '{local}'"
        found = self._client.search_runs([self._experiment()], filter_string=query, max_results=1)
        return found[0].info.run_id if found else None

    def _create(self, event: Event) -> str:
        tags = {LOCAL_ID: self._header["run"]}
        parent = self._header["config"]["tracking"]["parent"]
        if parent is not None and parent.startswith(LOCAL):  # the server had not been reached when this run began
            parent = self._find(parent)
        if parent:
            tags["mlflow.parentRunId"] = parent
        name = self._header["config"]["name"]
        return self._client.create_run(self._experiment(), event["time"], tags, run_name=name).info.run_id

    def _start(self, run_id: str, event: Event) -> None:
        self._client.update_run(run_id, status="RUNNING")
        tags = dict(event["tags"])
        if tags.get("git_commit", "unknown") != "unknown":
            tags["mlflow.source.git.commit"] = tags["git_commit"]  # the UI shows this one
        self._tags(run_id, {"values": tags})

    def _tags(self, run_id: str, event: Event) -> None:
        made = self._entities.RunTag
        self._log(run_id, "tags", [made(name[:KEY], value[:TAG]) for name, value in event["values"].items()])

    def _params(self, run_id: str, event: Event) -> None:
        made = self._entities.Param
        self._log(run_id, "params", [made(_key(name), value[:PARAM]) for name, value in event["values"].items()])

    def _metrics(self, run_id: str, *events: Event) -> None:
        rows = [
            self._entities.Metric(metric_name(name), value, event["time"], event["step"])
            for event in events
            for name, value in event["values"].items()
        ]
        self._log(run_id, "metrics", rows)

    def _log(self, run_id: str, kind: str, rows: list[Any]) -> None:
        for start in range(0, len(rows), AT_ONCE[kind]):
            self._client.log_batch(run_id, **{kind: rows[start : start + AT_ONCE[kind]]})

    def _dataset(self, run_id: str, event: Event) -> None:
        made = self._entities
        source, profile = json.dumps({"uri": event["source"], "sha256": event["digest"]}), json.dumps(event["profile"])
        dataset = made.Dataset(event["name"][:KEY], event["digest"][:DIGEST], "local", source, profile=profile)
        context = made.InputTag("mlflow.data.context", "training")
        self._client.log_inputs(run_id, [made.DatasetInput(dataset, [context])])

    def _artifact(self, run_id: str, event: Event) -> None:
        relative = Path(event["path"])
        path = self._folder / relative
        if path.is_dir():
            self._client.log_artifacts(run_id, str(path), path.name)
        else:
            inside = not relative.is_absolute() and relative.parent != Path()
            self._client.log_artifact(run_id, str(path), relative.parent.as_posix() if inside else None)

    def _model(self, run_id: str, event: Event) -> None:
        path = self._folder / event["path"]
        if self._client.get_run(run_id).data.tags.get(LOGGED_MODEL) == path.name:
            return
        from dist_obdsd.tracking.mlflow_model import log_model

        log_model(self._client, run_id, path)
        self._client.set_tag(run_id, LOGGED_MODEL, path.name)

    def _end(self, run_id: str, event: Event) -> None:
        self.terminate(event["status"], event["time"])
