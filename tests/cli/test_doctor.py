"""``doctor`` on weights, and the template for one's own photos."""

from pathlib import Path

import pytest
import yaml

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
    assert main([*grey, "model.pretrained=none"]) == 0
    assert "network: resnet18 with 11.2 million weights, from none" in capfd.readouterr().out
    assert main([*grey, "model.pretrained=torchvision"]) == 0
    assert f"is not in {folder}/hub/hub/checkpoints; --download fetches it" in capfd.readouterr().out
    assert main([*grey, "model.pretrained=torchvision", "--download"]) == 2
    assert "cannot be downloaded" in capfd.readouterr().err


def test_the_template_serves_twelve_classes_of_eight_photos(tmp_path: Path) -> None:
    runs.make_images(tmp_path / "photos", classes=12)
    done = runs.program("pack", "folder", "--source", "photos", "--out", "data/folder", "--workers", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load((ROOT / "configs" / "folder.yaml").read_text())
    assert config["data"]["shards"] == "data/folder"
    (tmp_path / "photos.yaml").write_text((ROOT / "configs" / "folder.yaml").read_text())
    # Smaller and shorter than the template, which changes nothing in what fits.
    small = ("model.pretrained=none", "data.image_size=32", "data.resize=36", "epochs=2", "tracking.kind=none",
             "tracking.figures=false")  # fmt: skip
    done = runs.program("train", "photos.yaml", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "best_validation" in done.stdout
