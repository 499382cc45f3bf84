"""Exported networks: read back by their own runtimes, beside the checkpoint they were made from."""

import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

import dist_obdsd
from dist_obdsd import export as exporting
from dist_obdsd.cli.main import main
from dist_obdsd.config.sections import DataConfig
from dist_obdsd.data.images import decode
from dist_obdsd.data.transforms import eval_transform
from dist_obdsd.errors import RunError


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """Both formats of the tiny run, by the command, verified on its images."""
    out = tmp_path_factory.mktemp("exported") / "new" / "ex"
    with warnings.catch_warnings(action="error", category=UserWarning):  # torch's own, which nobody could act on
        assert main(["export", f"{trained}/runs/tiny", "--out", f"{out}/x/..", "--images", f"{trained}/images"]) == 0
    return out


def paths(trained: Path) -> list[Path]:
    return sorted((trained / "images").glob("*/*.png"))


def test_the_preprocessing_is_in_every_file(exported):
    about = json.loads((exported / "preprocessing.json").read_text())
    verified = about.pop("verified")
    assert verified["batch_sizes"] == list(exporting.BATCHES)
    assert set(verified["largest_difference"]) == {"torch", "onnx"}
    assert max(verified["largest_difference"].values()) <= 1e-5
    assert about["input"] == {"name": "images", "dtype": "uint8", "shape": ["batch", 1, 16, 16]}
    assert about["resize"] == {"shorter_side": 18, "interpolation": "bilinear", "antialias": True}
    assert about["normalisation"]["mean"] == [0.5]
    assert about["output"]["shape"] == ["batch", 16]
    assert len(about["checkpoint"]["sha256"]) == 64
    session = onnxruntime.InferenceSession(exported / "model.onnx")
    assert session.get_inputs()[0].shape == about["input"]["shape"]
    assert json.loads(session.get_modelmeta().custom_metadata_map["preprocessing"]) == about
    extra = {"preprocessing.json": ""}
    torch.export.load(exported / "model.pt2", extra_files=extra)
    assert json.loads(extra["preprocessing.json"]) == about


README = Path(exporting.__file__).with_name("export_readme.md").read_text()
PREPARING, WITH_TORCH, WITH_ONNX = re.findall("```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("size", [1, 2, 7, 192])
def test_the_readme_s_program_gives_the_checkpoint_s_rows(size, trained, exported, monkeypatch):
    assert (exported / "README.md").read_text() == README
    assert re.findall(r"^(?:import|from) (\w+)", PREPARING, re.MULTILINE) == ["json", "numpy", "PIL"]
    monkeypatch.chdir(exported)
    names: dict[str, Any] = {"paths": paths(trained)[:size]}
    exec(PREPARING, names)
    wanted = dist_obdsd.load(trained / "runs" / "tiny")(names["paths"])
    for part in (WITH_TORCH, WITH_ONNX):
        names.pop("rows", None)
        exec(part, names)
        rows = torch.as_tensor(names["rows"]).detach()
        assert rows.dtype == torch.float32
        np.testing.assert_allclose(rows, wanted, atol=1e-5)


MODES = {"RGB": "jpg", "L": "png", "RGBA": "png", "LA": "webp", "P": "gif", "1": "tif", "CMYK": "jpg", "I;16": "png"}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("mode", "fit"),
    [(mode, "square") for mode in [*MODES, "palette with transparency", "turned", "tall", "small"]]
    + [("tall", fit) for fit in ("crop", "squash", "pad")],
)
def test_the_readme_prepares_every_kind_of_image_to_the_bit(mode, fit, channels, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    size = {"tall": (411, 17), "small": (5, 9)}.get(mode, (97, 131))
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 1 << 16, size).astype(np.uint16))
    else:
        image = Image.fromarray(rng.integers(0, 256, (*size, 4)).astype(np.uint8), "RGBA")
        image = image.quantize(64) if "palette" in mode else image.convert(mode if mode in MODES else "RGB")
    path, exif = tmp_path / f"x.{MODES.get(mode, 'png')}", Image.Exif()
    exif[0x0112] = 6 if mode == "turned" else 1
    image.save(path, exif=exif)
    given = {"image_size": 32, "resize": 40} if fit == "square" else {"image_size": [24, 40], "fit": fit}
    data = DataConfig.model_validate(given | {"shards": "x", "channels": channels, "mean": (0.3,), "std": (0.5,)})
    embedder = SimpleNamespace(config=SimpleNamespace(data=data), dim=1, path=path)  # the image plays the checkpoint
    (tmp_path / "preprocessing.json").write_text(json.dumps(exporting.preprocessing(embedder)))  # type: ignore[arg-type]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"paths": [path]}
    exec(PREPARING, names)
    wanted = eval_transform(decode(path.read_bytes(), channels), data)
    np.testing.assert_array_equal(names["images"], wanted[None].numpy())


def test_what_does_not_agree_is_not_left_behind(trained, tmp_path, monkeypatch):
    out = tmp_path / "ex"
    some = paths(trained)[:3]
    largest = exporting.export(trained / "runs" / "tiny", out, ["torch"], some, "here")
    assert 0 < largest["torch"] <= 1e-5  # the checkpoint is in float64, so float32 shows
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert set(before) == {"model.pt2", "preprocessing.json", "README.md"}
    monkeypatch.setattr(exporting, "TOLERANCE", largest["torch"] / 10)
    with pytest.raises(RunError, match="torch export differs from the checkpoint by"):
        exporting.export(trained / "runs" / "tiny", out, ["torch"], some, "here")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before  # the earlier one stands
    assert [path.name for path in tmp_path.iterdir()] == ["ex"]


ROWS = torch.arange(exporting.IMAGES, dtype=torch.float32)[:, None]
OTHERS = [(ROWS + 1e-4 * (row == ROWS), "differs from the checkpoint by") for row in (0, 5, exporting.IMAGES - 1)]
OTHERS += [(ROWS * torch.nan, "by nan"), (ROWS.expand(-1, 2), "gives shape")]


@pytest.mark.parametrize(("rows", "words"), OTHERS)
def test_verifying_sees_a_difference_in_any_batch(rows, words):
    assert exporting.verify("torch", lambda batch: batch * 1.0, ROWS, ROWS) == 0
    with pytest.raises(RunError, match=words):
        exporting.verify("torch", lambda batch: batch, rows, ROWS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("nowhere", "there is no checkpoint at nowhere"),
        ("tiny.yaml", "another kind of file"),
        ("runs/tiny --images runs", "holds no image"),
        ("runs/tiny --images {}/full", "full/a.png cannot be embedded"),
        ("runs/tiny --images images --shards packed", "give one of the two"),
        ("runs/tiny --shards packed --split other", "it has train, test"),
        ("runs/tiny --format coreml", "--format coreml is unknown"),
        ("runs/tiny --format=", "is unknown"),
        ("runs/tiny --format torch,onnx", "needs no_such_package"),
        ("runs/tiny --out {}/full", "holds other files"),
        ("runs/tiny --out {}/full/thesis.tex", "is a file"),
    ],
)
def test_bad_input_ends_with_one_sentence(trained, tmp_path, arguments, words, monkeypatch, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    (tmp_path / "full" / "a.png").write_text("mine")
    monkeypatch.setattr(exporting, "ONNX_PACKAGES", (*exporting.ONNX_PACKAGES, "no_such_package"))
    monkeypatch.chdir(trained)
    options = ["--out", str(tmp_path / "ex"), "--format", "torch", *arguments.format(tmp_path).split()]
    assert main(["export", *options]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "ex").exists()
