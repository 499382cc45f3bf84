import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_obdsd.cli import main as cli
from tests import runs


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 classes of 8 images, half of them to train on, packed by the real program."""
    folder = tmp_path_factory.mktemp("shards")
    runs.make_images(folder / "images")
    done = runs.program("pack", "folder", "--source", "images", "--out", "packed", "--workers", "1", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "packed"


@pytest.fixture
def folder(tmp_path: Path, shards: Path) -> Path:
    """An empty working folder with a config for the shards."""
    (tmp_path / "tiny.yaml").write_text(runs.CONFIG.replace("SHARDS", str(shards)))
    return tmp_path


@pytest.fixture
def train(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Train in this process: exit code, standard output, standard error."""
    monkeypatch.chdir(folder)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert "SLURM_STEP_ID" not in os.environ

    def run(*overrides: str) -> tuple[int, str, str]:
        code = cli.main(["train", "tiny.yaml", "data.workers=0", *overrides])
        out, err = capfd.readouterr()
        return code, out, err

    return run
