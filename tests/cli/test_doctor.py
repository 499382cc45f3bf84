"""``doctor`` on weights, and the template for one's own photos."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dist_obdsd.cli.main import main
from tests import runs
from tests.nursery import ROOT


def test_doctor_says_whether_weights_are_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TORCH_HOME", str(folder / "hub"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nobody answers
    grey = ["doctor", "tiny.yaml", "data.mean=null", "data.std=null", "data.channels=3", "model.backbone=resnet18"]
    assert main(["--local_rank=0", *grey, "model.pretrained=none"]) == 0  # the option is DeepSpeed's launcher's
    said = capfd.readouterr().out
    assert "network: resnet18 with 11.2 million weights, from none" in said
    assert torch.__version__.split("+")[0] in said
    assert "1, 2, 4 ranks" in said
    assert "all-reduce" not in said  # one rank
    assert main([*grey, "model.pretrained=torchvision"]) == 0
    assert f"is not in {folder}/hub/hub/checkpoints; --download fetches it" in capfd.readouterr().out
    assert main([*grey, "model.pretrained=torchvision", "--download"]) == 2
    out, err = capfd.readouterr()
    assert "cannot be downloaded" in err
    assert "memory of each" in out
    assert "strategy=fsdp" not in out  # another strategy's, where the config's own fits


def test_the_template_serves_twelve_classes_of_eight_photos(tmp_path: Path) -> None:
    """Without a network, with nothing edited; only smaller images, fewer epochs and workers."""
    runs.make_images(tmp_path / "photos", classes=12)
    done = runs.program("pack", "folder", "--source", "photos", "--out", "data/folder", "--workers", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shutil.copy(ROOT / "configs" / "folder.yaml", tmp_path)
    alone = {"HF_HOME": f"{tmp_path}/hub", "https_proxy": "http://127.0.0.1:9"}  # where nobody answers
    short = ("name=run", "epochs=2", "data.image_size=64", "data.workers=0")
    quiet = ("tracking.kind=none", "tracking.figures=false")
    done = runs.program("train", "folder.yaml", *short, *quiet, cwd=tmp_path, env=alone)
    assert done.returncode == 0, done.stderr
    assert "until then small_cnn is trained from random weights" in done.stdout
    assert "optim.lr=0.0009" in done.stdout
    rows = json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())["rows"]
    assert {row["protocol"] for row in rows} == {"untrained", "last", "best_validation"}
