"""The figures of a real run: drawn at its end, anew, after a stop, and what is missing is said."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dist_obdsd.cli import main as cli
from dist_obdsd.figures.run_figures import BatchSample, RunFigures
from tests import runs

NAMES = {"retrieval_grid", "embedding_map", "spectrum", "batch_manifold"}


def pngs(run: Path) -> set[str]:
    found = set()
    for path in (run / "figures").glob("*.png"):
        with Image.open(path) as picture:
            picture.load()
            assert min(picture.size) > 300
        found.add(path.stem)
    return found


def test_a_resumed_run_draws_every_figure_also_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder / "runs" / "tiny"
    runs.train(folder, "epochs=2", "max_steps=5")
    assert not (run / "figures").exists()
    done = runs.train(folder, "epochs=2", "tracking.figures=true", ranks=2)
    assert "4 figures in runs/tiny/figures" in done.stdout
    assert pngs(run) == NAMES
    with np.load(run / "figures" / "batch.npz") as kept:
        assert json.loads(str(kept["about"])) == {"whose": "teacher", "epoch": 2}
        assert len(kept["rows"]) == 16

    # Anew, without the network, and where the shards are gone, too, all but the images.
    shutil.rmtree(run / "checkpoints")
    for path in (run / "figures").glob("*.png"):
        path.unlink()
    monkeypatch.chdir(folder)
    assert cli.main(["figures", "runs/tiny", "data.shards=nowhere"]) == 1
    assert pngs(run) == NAMES - {"retrieval_grid"}
    told = capsys.readouterr().err
    assert "retrieval_grid.png" in told
    assert "nowhere" in told


def test_a_folder_without_kept_data_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert cli.main(["figures", "nowhere"]) == 2
    assert "nowhere has no config.yaml" in capsys.readouterr().err
    (folder / "young").mkdir()
    (folder / "young" / "config.yaml").write_text((folder / "tiny.yaml").read_text())
    assert cli.main(["figures", "young"]) == 2
    assert "tracking.figures=true" in capsys.readouterr().err


def test_what_cannot_be_kept_never_ends_a_run(
    tmp_path: Path, small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "dist_obdsd")
    (tmp_path / "figures").write_text("a file where the folder should be")
    (small_disk / "fill").write_bytes(bytes(1 << 20))
    batch = BatchSample(torch.eye(4), torch.arange(4), "teacher")
    for run in (tmp_path, small_disk, None):
        RunFigures(run).keep_batch(batch, 0)
    assert RunFigures(None).draw() == []
    assert len(caplog.messages) == 2
    assert all("the run goes on" in message for message in caplog.messages)
