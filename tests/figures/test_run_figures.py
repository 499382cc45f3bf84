"""The figures of a real run: drawn at its end, anew, after a stop, and what is missing is said."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from dist_obdsd.cli import main as cli
from dist_obdsd.config import load_config
from dist_obdsd.figures.run_figures import BatchSample, RunFigures, RunFolder
from tests import runs

NAMES = {"loss_curves", "recall_curves", "retrieval_grid", "embedding_map", "spectrum", "batch_manifold"}


def pngs(run: Path) -> set[str]:
    found = set()
    for path in (run / "figures").glob("*.png"):
        with Image.open(path) as picture:
            picture.load()
            assert min(picture.size) > 300
        found.add(path.stem)
    return found


def test_a_resumed_run_draws_every_figure_and_no_step_twice(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = folder / "runs" / "tiny"
    more = ("evaluation.untrained=true", "epochs=2")
    runs.train(folder, *more, "max_steps=5")
    assert not (run / "figures").exists()
    # As if killed after more steps than the checkpoint has: those are done, and recorded, again.
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "step", "step": 5, "epoch": 0, "ranking": 9.0, "lr": 0.001, "ramp": 0}) + "\n")
    done = runs.train(folder, *more, "tracking.figures=true", ranks=2)
    assert "6 figures and report.html in runs/tiny" in done.stdout
    assert pngs(run) == NAMES

    monkeypatch.chdir(folder)
    pages = RunFolder(run, load_config(run / "config.yaml"))
    losses = pages.loss_curves()
    assert losses is not None
    steps = runs.metrics(run, "step")
    line = losses.axes[0].lines[0]
    assert list(line.get_xdata()) == list(range(len(steps)))
    assert list(line.get_ydata()) == [row["ranking"] for row in steps]
    recall = pages.recall_curves()
    assert recall is not None
    rows = json.loads((run / "summary.json").read_text())["rows"]
    last = {int(r["metric"][7:]): r["value"] for r in rows if r["protocol"] == "last" and r["metric"] != "map@r"}
    drawn = {line.get_label().partition(":")[0]: dict(line.get_xydata().tolist()) for line in recall.axes[0].lines}
    assert drawn["last (after epoch 2)"] == pytest.approx({k: 100 * value for k, value in last.items()})
    assert drawn.keys() == {"untrained", "last (after epoch 2)"}
    manifold = pages.batch_manifold()
    assert manifold is not None
    assert manifold._suptitle.get_text().endswith("the last batch of epoch 2 as the teacher embedded it")
    assert len(manifold.axes[0].images[0].get_array()) == 16

    # Anew, without the network, and where the shards are gone, too, all but the images.
    shutil.rmtree(run / "checkpoints")
    for path in (run / "figures").glob("*.png"):
        path.unlink()
    assert cli.main(["figures", "runs/tiny", "data.shards=nowhere"]) == 1
    assert pngs(run) == NAMES - {"retrieval_grid"}
    told = capsys.readouterr().err
    assert "retrieval_grid.png" in told
    assert "nowhere" in told


def test_a_young_run_has_few_figures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert cli.main(["figures", "nowhere"]) == 2
    young = folder / "young"
    young.mkdir()
    (young / "config.yaml").write_text((folder / "tiny.yaml").read_text())
    step = {"kind": "step", "step": 0, "epoch": 0, "ramp": 0, "lr": 0.1, "ranking": 1.0}
    (young / "metrics.jsonl").write_text(json.dumps(step) + '\n{"kind": "st')
    assert cli.main(["figures", "young"]) == 0
    assert pngs(young) == {"loss_curves"}


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
