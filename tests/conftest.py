import gc
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from dist_obdsd.cli.main import main
from dist_obdsd.machine import usable_cores
from tests import harness, nursery, runs

gc.disable()
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

SLOW = (
    "training", "launch", "experiments", "benchmarks", "tracking", "gpu", "cli", "examples", "figures",
    "test_knn.py", "test_precision.py", "test_backbones.py", "test_stream_properties.py", "test_glyphs.py",
    "test_bare.py", "test_export.py", "test_measure.py", "test_clustering.py",
)  # fmt: skip
"""Folders and files whose tests train, launch processes or take long: `make test-fast` leaves them out."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One process more than there are cores, since tests wait for programs, and at most four, for the memory."""
    return min(4, usable_cores() + 1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts runs or programs as slow. Put long tests first, so that workers end together."""
    for item in items:
        if item.path.parent.name in SLOW or item.path.name in SLOW:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: (item.get_closest_marker("slow") is None, item.path.parent.name != "training"))


def pytest_collection_finish() -> None:
    """Collect garbage again, now that all is imported."""
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _processes() -> Iterator[None]:
    yield
    harness.close()
    nursery.close()


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all of the session's processes."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def shards(shared: Path) -> Path:
    """24 classes of 8 images, half of them to train on, packed; beside them ``images``. To be read only."""
    folder = shared / "shards"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            runs.make_images(folder / "images")
            places = ("--source", f"{folder}/images", "--out", f"{folder}/packed")
            assert main(["pack", "folder", *places, "--workers", "1"]) == 0
    return folder / "packed"


@pytest.fixture(scope="session")
def trained(shared: Path, shards: Path) -> Path:
    """A folder with ``images/``, their ``packed/`` shards and the finished run ``runs/tiny``, to be read only.

    The run held out classes, so it has a best epoch, and is tracked in ``mlflow.db``.
    """
    folder = shared / "trained"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            shutil.copytree(shards.parent, folder)
            (folder / "tiny.yaml").write_text(runs.CONFIG.replace("SHARDS", "packed"))
            settings = ("data.resize=18", "validation.fraction=0.25", "evaluation.test=false", "tracking.kind=mlflow")
            runs.train(folder, *settings, f"tracking.wait_seconds={runs.SECONDS}")  # for a machine that is busy
    return folder


@pytest.fixture(scope="session")
def untouched(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Callable[..., Path]:
    """The folder of a finished run that nobody touched, by its settings and ranks; each is trained once."""
    folder, done = tmp_path_factory.mktemp("untouched"), dict[tuple[object, ...], Path]()
    (folder / "tiny.yaml").write_text(runs.CONFIG.replace("SHARDS", str(shards)))

    def finished(*overrides: str, ranks: int = 0) -> Path:
        run = folder / "runs" / f"run-{len(done)}"
        if (overrides, ranks) not in done:
            runs.train(folder, f"name={run.name}", *overrides, ranks=ranks)
        return done.setdefault((overrides, ranks), run)

    return finished


@pytest.fixture
def folder(tmp_path: Path, shards: Path) -> Path:
    """An empty working folder with a config for the shards."""
    (tmp_path / "tiny.yaml").write_text(runs.CONFIG.replace("SHARDS", str(shards)))
    return tmp_path


@pytest.fixture
def run(folder: Path) -> Path:
    """The folder of the run that is trained in ``folder``."""
    return folder / "runs" / "tiny"


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """``runs.program`` in this process."""

    def run(*arguments: str | Path, cwd: Path, exits: int = 0) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(cwd)
        capfd.readouterr()
        done = subprocess.CompletedProcess(arguments, main([*map(str, arguments)]), *capfd.readouterr())
        assert done.returncode == exits, done
        return done

    return run


@pytest.fixture
def train(cli: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    """``runs.train`` in this process and in ``folder``."""
    return lambda *overrides, exits=0: cli("train", "tiny.yaml", "data.workers=0", *overrides, cwd=folder, exits=exits)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one MiB."""
    folder = tmp_path / "small disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mount.returncode:
        pytest.skip(f"a small file system cannot be mounted here ({mount.stderr.strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
