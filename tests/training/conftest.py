from pathlib import Path

import pytest

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
