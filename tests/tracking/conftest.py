from collections.abc import Iterator

import pytest

from tests.tracking.server import Server


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("mlflow"))
    try:
        yield started.start()
    finally:
        started.kill()


@pytest.fixture
def server(mlflow_server: Server) -> Server:
    """Running, whatever a test before has done to it."""
    return mlflow_server.start()
