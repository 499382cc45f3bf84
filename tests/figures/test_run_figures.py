"""The figures of a real run: drawn at its end, anew, after a stop, and what is missing is said."""

import json
import shutil

import numpy as np
import torch

from dist_obdsd.figures.run_figures import BatchSample, RunFigures
from tests import runs

NAMES = {"retrieval_grid", "embedding_map", "spectrum", "batch_manifold"}


def pngs(run):
    return {path.stem for path in (run / "figures").glob("*.png")}


def test_a_resumed_run_draws_every_figure_also_anew(cli, folder, run):
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
    told = cli("figures", "runs/tiny", "data.shards=nowhere", cwd=folder, exits=1).stderr
    assert pngs(run) == NAMES - {"retrieval_grid"}
    assert "retrieval_grid.png" in told
    assert "nowhere" in told


def test_a_folder_without_kept_data_is_refused(cli, folder):
    assert "nowhere has no config.yaml" in cli("figures", "nowhere", cwd=folder, exits=2).stderr
    (folder / "young").mkdir()
    (folder / "tiny.yaml").rename(folder / "young" / "config.yaml")
    assert "tracking.figures=true" in cli("figures", "young", cwd=folder, exits=2).stderr


def test_what_cannot_be_kept_never_ends_a_run(tmp_path, small_disk, caplog):
    caplog.set_level("INFO", "dist_obdsd")
    (tmp_path / "figures").write_text("a file where the folder should be")
    (small_disk / "fill").write_bytes(bytes(1 << 20))
    batch = BatchSample(torch.eye(4), torch.arange(4), "teacher")
    for run in (tmp_path, small_disk, None):
        RunFigures(run).keep_batch(batch, 0)
    assert RunFigures(None).draw() == []
    assert len(caplog.messages) == 2
    assert all("the run goes on" in message for message in caplog.messages)
