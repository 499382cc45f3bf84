"""``embed`` and ``evaluate`` as users start them: alone and under torchrun, from shards, folders and files."""

import csv
import json
import shutil

import numpy as np
import pytest

from tests import runs


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    """A folder with a trained run and the images that the shards were packed from."""
    place = tmp_path_factory.mktemp("commands")
    for name in ("runs", "images"):
        (place / name).symlink_to(trained / name)
    return place


def values(path):
    return {row["metric"]: row["value"] for row in json.loads(path.read_text())["rows"]}


@pytest.fixture(scope="module")
def embedded(run, shards):
    """The folder with embeddings of the shards, by one rank in ``0.npz`` and by two in ``2.npz``."""
    for out, ranks in (("0.npz", 0), ("2.npz", 2), ("0.parquet", 0)):
        runs.program("embed", "runs/tiny", "--shards", shards, "--out", out, cwd=run, ranks=ranks)
    runs.program("evaluate", "runs/tiny", "--shards", shards, "--json", "e.json", "--per-class", "e.csv", cwd=run)
    return run


def test_a_file_of_embeddings_has_a_row_per_image(embedded):
    assert (embedded / "0.npz").read_bytes() == (embedded / "2.npz").read_bytes()
    with np.load(embedded / "0.npz") as archive:
        assert archive["embeddings"].shape == (96, 16)
        np.testing.assert_allclose(np.linalg.norm(archive["embeddings"], axis=1), 1, atol=1e-6)
        assert len(set(archive["keys"].tolist())) == 96
        for key, name in zip(archive["keys"], archive["classes"], strict=True):  # the files that were packed
            assert key.rpartition("/")[0] == name
        assert len(set(archive["classes"].tolist())) == 12


@pytest.mark.parametrize(("file", "ranks", "backend"), [("0.parquet", 2, "auto"), ("0.npz", 0, "torch")])
def test_embeddings_measure_as_their_checkpoint(embedded, shards, tmp_path, file, ranks, backend):
    files = ("--json", tmp_path / "f.json", "--per-class", tmp_path / "f.csv")
    settings = (f"evaluation.backend={backend}", "evaluation.recall_at=[1, 2]")
    runs.program("evaluate", "--embeddings", file, *settings, "--shards", shards, *files, cwd=embedded, ranks=ranks)
    # Embeddings are unit rows but for their last bits, which decide nothing here.
    assert values(tmp_path / "f.json") == pytest.approx(values(embedded / "e.json"), abs=1e-12)
    assert (tmp_path / "f.csv").read_text() == (embedded / "e.csv").read_text()
    rows = list(csv.DictReader((embedded / "e.csv").open()))
    assert len(rows) == 12
    mean = sum(int(row["queries"]) * float(row["recall@1"]) for row in rows) / 96
    assert mean == pytest.approx(values(embedded / "e.json")["recall@1"])


def test_evaluate_gives_the_run_s_own_numbers(untouched, shards, tmp_path):
    run = untouched()
    last = values(run / "summary.json")
    assert {"recall@1", "recall@2", "map@r"} <= last.keys()
    for ranks in (0, 2):
        runs.program("evaluate", run, "--shards", shards, "--json", "numbers.json", ranks=ranks, cwd=tmp_path)
        assert values(tmp_path / "numbers.json") == last


def test_failures_are_drawn_alike_on_any_number_of_ranks(embedded, shards):
    drawing = ("--shards", shards, "--failures")
    done = runs.program("evaluate", "--embeddings", "0.npz", *drawing, "none.png", cwd=embedded)
    assert "none.png is not written" in done.stdout  # no query failed
    assert not (embedded / "none.png").exists()
    with np.load(embedded / "0.npz") as archive:
        arrays = dict(archive)
    arrays["embeddings"] += np.random.default_rng(0).standard_normal((96, 16)).astype(np.float32) / 4
    np.savez(embedded / "bad.npz", **arrays)
    for ranks in (0, 2):
        runs.program("evaluate", "--embeddings", "bad.npz", *drawing, f"{ranks}.png", cwd=embedded, ranks=ranks)
    assert (embedded / "0.png").read_bytes() == (embedded / "2.png").read_bytes()


def test_a_folder_embeds_alike_on_any_number_of_ranks(run):
    for ranks, out in ((0, "a.npz"), (2, "b.npz")):
        options = ("--images", "images", "--out", out, "--dtype", "float16")
        runs.program("embed", "runs/tiny", *options, cwd=run, ranks=ranks)
    assert (run / "a.npz").read_bytes() == (run / "b.npz").read_bytes()
    with np.load(run / "a.npz") as archive:
        assert archive["embeddings"].dtype == np.float16
        assert archive["keys"].tolist() == sorted(archive["keys"].tolist())
        assert archive["keys"][9] == "class_01/1.png"
        assert archive["classes"][9] == "class_01"
        assert archive["labels"].tolist() == [i // 8 for i in range(192)]
    assert "192 queries" in runs.program("evaluate", "--embeddings", "a.npz", cwd=run).stdout


def test_a_broken_image_is_named(run, tmp_path):
    shutil.copytree(run / "images" / "class_00", tmp_path / "some")
    (tmp_path / "some" / "9.png").write_bytes(b"no image")
    embed = ("embed", run / "runs" / "tiny", "--images", "some", "--out")
    assert "some/9.png cannot be decoded" in runs.program(*embed, "a.npz", cwd=tmp_path, exits=1).stderr
    assert not list(tmp_path.glob("*.npz"))
    assert "left out 9.png" in runs.program(*embed, "a.npz", "--skip-broken", cwd=tmp_path, ranks=2).stdout
    with np.load(tmp_path / "a.npz") as archive:
        assert set(archive) == {"ids", "keys", "embeddings"}  # in one folder there are no classes
        assert archive["keys"].tolist() == [f"{n}.png" for n in range(8)]
        assert archive["ids"].tolist() == list(range(8))
    for path in (tmp_path / "some").iterdir():
        path.write_bytes(b"no image")
    none = runs.program(*embed, "c.npz", "--skip-broken", cwd=tmp_path, ranks=2, exits=2)
    assert "none of the 9 images can be read" in none.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("evaluate", "CHECKPOINT or --embeddings"),
        ("evaluate runs/tiny", "with --shards"),
        ("evaluate --embeddings x.npz", "x.npz: No such file"),
        ("evaluate --embeddings x.npz --failures x.png", "with --shards"),
        ("evaluate --embeddings x.npz --json nowhere/x.json", "nowhere/x.json"),
        ("evaluate --embeddings small.npz evaluation.recall_at=[9]", "k=9"),
        ("embed runs/tiny --out x.npz", "--shards DIR or --images DIR"),
        ("embed runs/tiny --images images --out x.csv", "'.csv'"),
        ("embed runs/tiny --images nowhere --out x.npz", "nowhere is not a folder"),
    ],
)
def test_bad_input_ends_with_2_and_one_sentence(cli, run, arguments, words):
    np.savez(run / "small.npz", embeddings=np.eye(4), labels=[0, 0, 1, 1])
    (message,) = cli(*arguments.split(), cwd=run, exits=2).stderr.splitlines()
    assert words in message
