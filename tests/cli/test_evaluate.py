"""``embed`` and ``evaluate`` as users start them: alone and under torchrun, from shards, folders and files."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_obdsd.cli.main import main
from tests import runs


@pytest.fixture(scope="module")
def run(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained run and the images that the shards were packed from."""
    place = tmp_path_factory.mktemp("commands")
    for name in ("runs", "images"):
        (place / name).symlink_to(trained / name)
    return place


def values(path: Path) -> dict[str, float]:
    return {row["metric"]: row["value"] for row in json.loads(path.read_text())["rows"]}


def done(*arguments: str | Path, cwd: Path, ranks: int = 0) -> str:
    process = runs.program(*arguments, cwd=cwd, ranks=ranks)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def embedded(run: Path, shards: Path) -> Path:
    """The folder with embeddings of the shards, by one rank in ``0.npz`` and by two in ``2.npz``."""
    for ranks in (0, 2):
        done("embed", "runs/tiny", "--shards", shards, "--out", f"{ranks}.npz", cwd=run, ranks=ranks)
    done("embed", "runs/tiny", "--shards", shards, "--out", "0.parquet", cwd=run)
    done("evaluate", "runs/tiny", "--shards", shards, "--json", "e.json", "--per-class", "e.csv", cwd=run)
    return run


def test_a_file_of_embeddings_has_a_row_per_image(embedded: Path) -> None:
    assert (embedded / "0.npz").read_bytes() == (embedded / "2.npz").read_bytes()
    with np.load(embedded / "0.npz") as archive:
        assert archive["embeddings"].shape == (96, 16)
        np.testing.assert_allclose(np.linalg.norm(archive["embeddings"], axis=1), 1, atol=1e-6)
        assert len(set(archive["keys"].tolist())) == 96
        for key, name in zip(archive["keys"], archive["classes"], strict=True):  # the files that were packed
            assert key.rpartition("/")[0] == name
        assert len(set(archive["classes"].tolist())) == 12


@pytest.mark.parametrize(("file", "ranks", "backend"), [("0.parquet", 2, "auto"), ("0.npz", 0, "torch")])
def test_embeddings_measure_as_their_checkpoint(
    embedded: Path, shards: Path, tmp_path: Path, file: str, ranks: int, backend: str
) -> None:
    files = ("--json", tmp_path / "f.json", "--per-class", tmp_path / "f.csv")
    settings = (f"evaluation.backend={backend}", "evaluation.recall_at=[1, 2]")
    done("evaluate", "--embeddings", file, *settings, "--shards", shards, *files, cwd=embedded, ranks=ranks)
    # Embeddings are unit rows but for their last bits, which decide nothing here.
    assert values(tmp_path / "f.json") == pytest.approx(values(embedded / "e.json"), abs=1e-12)
    assert (tmp_path / "f.csv").read_text() == (embedded / "e.csv").read_text()
    rows = list(csv.DictReader((embedded / "e.csv").open()))
    assert len(rows) == 12
    mean = sum(int(row["queries"]) * float(row["recall@1"]) for row in rows) / 96
    assert mean == pytest.approx(values(embedded / "e.json")["recall@1"])


def test_failures_are_drawn_alike_on_any_number_of_ranks(embedded: Path, shards: Path) -> None:
    drawing = ("--shards", shards, "--failures")
    output = done("evaluate", "--embeddings", "0.npz", *drawing, "none.png", cwd=embedded)
    assert "none.png is not written" in output  # no query failed
    assert not (embedded / "none.png").exists()
    with np.load(embedded / "0.npz") as archive:
        arrays = dict(archive)
    arrays["embeddings"] += np.random.default_rng(0).standard_normal((96, 16)).astype(np.float32) / 4
    np.savez(embedded / "bad.npz", **arrays)
    for ranks in (0, 2):
        done("evaluate", "--embeddings", "bad.npz", *drawing, f"{ranks}.png", cwd=embedded, ranks=ranks)
    assert (embedded / "0.png").read_bytes() == (embedded / "2.png").read_bytes()
    with Image.open(embedded / "0.png") as picture:
        assert min(picture.size) > 500


def test_a_folder_embeds_alike_on_any_number_of_ranks(run: Path) -> None:
    for ranks, out in ((0, "a.npz"), (2, "b.npz")):
        done("embed", "runs/tiny", "--images", "images", "--out", out, "--dtype", "float16", cwd=run, ranks=ranks)
    assert (run / "a.npz").read_bytes() == (run / "b.npz").read_bytes()
    with np.load(run / "a.npz") as archive:
        assert archive["embeddings"].dtype == np.float16
        assert archive["keys"].tolist() == sorted(archive["keys"].tolist())
        assert archive["keys"][9] == "class_01/1.png"
        assert archive["classes"][9] == "class_01"
        assert archive["labels"].tolist() == [i // 8 for i in range(192)]
    assert "192 queries" in done("evaluate", "--embeddings", "a.npz", cwd=run)


def test_a_broken_image_is_named(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "images" / "class_00", tmp_path / "some")
    (tmp_path / "some" / "9.png").write_bytes(b"no image")
    embed = ("embed", run / "runs" / "tiny", "--images", "some", "--out")
    failed = runs.program(*embed, "a.npz", cwd=tmp_path)
    assert failed.returncode == 1
    assert "some/9.png cannot be decoded" in failed.stderr
    assert not list(tmp_path.glob("*.npz"))
    output = done(*embed, "a.npz", "--skip-broken", cwd=tmp_path, ranks=2)
    assert "left out 9.png" in output
    with np.load(tmp_path / "a.npz") as archive:
        assert set(archive) == {"ids", "keys", "embeddings"}  # in one folder there are no classes
        assert archive["keys"].tolist() == [f"{n}.png" for n in range(8)]
        assert archive["ids"].tolist() == list(range(8))
    for path in (tmp_path / "some").iterdir():
        path.write_bytes(b"no image")
    none = runs.program(*embed, "c.npz", "--skip-broken", cwd=tmp_path, ranks=2)
    assert none.returncode == 2
    assert "none of the 9 images can be read" in none.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("evaluate", "CHECKPOINT or --embeddings"),
        ("evaluate runs/tiny --embeddings x.npz", "CHECKPOINT or --embeddings"),
        ("evaluate runs/tiny", "with --shards"),
        ("evaluate --embeddings x.npz", "x.npz: No such file"),
        ("evaluate --embeddings x.npz --failures x.png", "with --shards"),
        ("evaluate --embeddings x.npz --json nowhere/x.json", "nowhere/x.json"),
        ("evaluate --embeddings small.npz evaluation.recall_at=[9]", "k=9"),
        ("evaluate --embeddings bare.npz", "neither labels nor classes"),
        ("embed runs/tiny --out x.npz", "--shards DIR or --images DIR"),
        ("embed runs/tiny --images images --out x.csv", "'.csv'"),
        ("embed runs/tiny --images nowhere --out x.npz", "nowhere is not a folder"),
        ("embed runs/tiny --images runs --out x.npz", "holds no image"),
        ("embed nowhere --images images --out x.npz", "there is no checkpoint"),
    ],
)
def test_bad_input_ends_with_2_and_one_sentence(
    run: Path, arguments: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(run / "small.npz", embeddings=np.eye(4), labels=[0, 0, 1, 1])
    np.savez(run / "bare.npz", embeddings=np.eye(4))
    monkeypatch.chdir(run)
    assert main(arguments.split()) == 2
    message = capsys.readouterr().err
    assert words in message
    assert len(message.strip().splitlines()) == 1
