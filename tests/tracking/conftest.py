"""A real MLflow server that can be made to hang."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.runs import SECONDS, free_port


class Server:
    def __init__(self, folder: Path) -> None:
        port = free_port()
        self.uri = f"http://127.0.0.1:{port}"
        arguments = ["--backend-store-uri", "sqlite:///server.db", "--artifacts-destination", "artifacts",
                     "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]  # fmt: skip
        with (folder / "server.log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *arguments], cwd=folder, stdout=log, stderr=log,
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + SECONDS
        while not self._answers():
            assert self.process.poll() is None, (folder / "server.log").read_text()[-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return True
        except OSError:
            return False

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """Let it take connections and never answer."""
        os.killpg(self.process.pid, signal.SIGSTOP)  # it has a worker process
        try:
            yield
        finally:
            os.killpg(self.process.pid, signal.SIGCONT)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("mlflow"))
    yield started
    os.killpg(started.process.pid, signal.SIGKILL)
    started.process.wait()
