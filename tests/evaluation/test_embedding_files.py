"""Files and indices of embeddings: round trips, the same bytes on any ranks, other tools' files, and bad ones."""

import os
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

import dist_obdsd
from dist_obdsd.cli.main import main
from dist_obdsd.distributed import collectives
from dist_obdsd.errors import InputError
from dist_obdsd.evaluation import embedding_files, faiss_index
from tests import harness

N, D = 50, 6
SUFFIXES = pytest.mark.parametrize("suffix", embedding_files.SUFFIXES)


def content() -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Embeddings, ascending ids with gaps, and the columns."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 7, N)
    columns = {
        "labels": labels,
        "classes": np.array([f"Größe {label}" for label in labels]),
        "roles": np.array(["query", "gallery", "both"])[rng.integers(0, 3, N)],
        "keys": np.array([f"{i:08d}" for i in range(N)]),
    }
    return rng.standard_normal((N, D)).astype(np.float32), np.sort(rng.permutation(3 * N)[:N]), columns


def write_worker(folder: str, suffix: str, dtype: str) -> str:
    rows, ids, columns = content()
    world, rank = collectives.world_size(), collectives.rank()
    # Uneven, out of order, and one image on two ranks.
    own = np.random.default_rng(1).permutation(N)[rank::world][::-1].copy()
    if world == 3 and rank == 1:
        own = own[:0]
    if world == 3 and rank == 2:
        own = np.arange(N)
    path = Path(folder) / f"{world}-{dtype}{suffix}"
    table = {"ids": ids, **columns}
    with unittest.mock.patch.object(embedding_files, "BLOCK", 7):
        embedding_files.write(path, torch.from_numpy(rows[own]), torch.from_numpy(ids[own]), table, dtype)
    return str(path)


@SUFFIXES
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_round_trip_and_the_same_bytes_on_any_number_of_ranks(suffix, dtype, tmp_path, monkeypatch):
    files = [harness.run(world, write_worker, str(tmp_path), suffix, dtype)[0] for world in harness.WORLD_SIZES]
    monkeypatch.setattr(embedding_files, "BLOCK", 7)
    assert len({Path(file).read_bytes() for file in files}) == 1
    assert not list(tmp_path.glob(".*"))  # nothing half written stays
    rows, ids, columns = content()
    found = embedding_files.read(Path(files[0]))
    assert torch.equal(found.rows_nD, torch.from_numpy(rows.astype(dtype).astype(np.float32)))
    columns_read = (found.ids_n.tolist(), found.labels_n.tolist(), found.roles)
    assert columns_read == tuple(column.tolist() for column in (ids, columns["labels"], columns["roles"]))
    assert found.class_names == {label: f"Größe {label}" for label in range(7)}
    if suffix == ".npz":
        with np.load(files[0]) as archive:  # what other tools see
            assert set(archive) == {"ids", "embeddings", *columns}
            assert archive["embeddings"].dtype == dtype
    else:
        assert parquet.read_table(files[0])["embeddings"].type == pa.list_(pa.from_numpy_dtype(np.dtype(dtype)), D)


def read_worker(path: str) -> tuple[list[list[float]], list[int], list[int], list[str]]:
    found = embedding_files.read(Path(path))
    return found.rows_nD.tolist(), found.ids_n.tolist(), found.labels_n.tolist(), found.roles


def save(path: Path, arrays: dict[str, Any]) -> Path:
    if path.suffix == ".npz":
        np.savez_compressed(path, **arrays)
    else:
        columns = {name: list(value) if np.ndim(value) == 2 else value for name, value in arrays.items()}
        parquet.write_table(pa.table(columns), path, row_group_size=11)
    return path


@SUFFIXES
@pytest.mark.parametrize("form", ["plain", "texts", "double", "by columns"])
def test_other_tools_files_are_cut_among_the_ranks(suffix, form, tmp_path):
    rows, _, columns = content()
    arrays: dict[str, Any] = {"embeddings": rows, "labels": columns["labels"].astype(np.int32), "more": np.arange(N)}
    if form == "texts":
        arrays["labels"] = columns["classes"]
    if form == "double":
        arrays["embeddings"] = rows.astype(np.float64)
    if form == "by columns":
        arrays["embeddings"] = np.asfortranarray(rows)
    path = save(tmp_path / f"other{suffix}", arrays)
    for world in harness.WORLD_SIZES:
        parts = harness.run(world, read_worker, str(path))
        assert len(parts[0][1]) in (N // world, N // world + 1)
        together = [[one for part in parts for one in part[i]] for i in range(4)]
        assert together == [rows.tolist(), list(range(N)), columns["labels"].tolist(), ["both"] * N]


ROWS, IDS, COLUMNS = content()
BAD = [
    ({"ids": np.where(np.arange(N) == 5, IDS[4], IDS)}, "1 ids more than once, the first is"),
    ({"embeddings": None}, "no embeddings, only ids, labels"),
    ({"labels": None}, "neither labels nor classes"),
    ({"labels": COLUMNS["labels"] + 0.5}, "labels of type float64"),
    ({"labels": [b"a"] * N}, "labels of type"),
    ({"embeddings": ROWS.astype(np.int64)}, "type int64"),
    ({"embeddings": ROWS[:0], "ids": IDS[:0], "labels": COLUMNS["labels"][:0].astype(str)}, "has no embeddings"),
    ({"roles": [1] * N}, "roles of type int64"),
    ({"classes": [1.0] * N}, "classes of type float64"),
]


def refused_worker(path: str) -> str:
    with pytest.raises(InputError) as caught:
        embedding_files.read(Path(path))
    return str(caught.value)


@SUFFIXES
@pytest.mark.parametrize(("change", "words"), BAD)
def test_bad_columns_are_refused_in_one_sentence_on_every_rank(suffix, change, words, tmp_path):
    arrays = {"embeddings": ROWS, "ids": IDS, "labels": COLUMNS["labels"]} | change
    path = save(tmp_path / f"bad{suffix}", {name: of for name, of in arrays.items() if of is not None})
    (said,) = set(harness.run(2, refused_worker, str(path)))
    assert words in said
    assert "\n" not in said


def tables(embeddings: list[Any], labels: list[Any]) -> Callable[[Path], None]:
    return lambda path: parquet.write_table(pa.table({"embeddings": embeddings, "labels": labels}), path)


def archive(embeddings: np.ndarray, labels: Any) -> Callable[[Path], None]:
    return lambda path: np.savez(path, embeddings=embeddings, labels=labels)


LABELS = COLUMNS["labels"]
NO_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a.csv": (Path.touch, "ends in '.csv'"),
    "a": (Path.touch, "no suffix"),
    "missing.npz": (str, "No such file"),
    "missing.parquet": (str, "cannot read"),
    "pipe.npz": (os.mkfifo, "no plain file"),
    "pipe.parquet": (os.mkfifo, "no plain file"),
    "text.npz": (lambda path: path.write_text("hello"), "not a sound .npz file"),
    "text.parquet": (lambda path: path.write_text("hello"), "not a sound .parquet file"),
    "length.npz": (archive(ROWS, LABELS[1:]), "50 embeddings but labels of shape (49,)"),
    "objects.npz": (archive(ROWS, np.array([{}] * N, dtype=object)), "not a sound .npz file"),
    "flat.npz": (archive(ROWS.reshape(-1), LABELS), "shape (300,)"),
    "uneven.parquet": (tables([[1.0, 2.0], [1.0, 2.0, 3.0, 4.0]], [1, 1]), "not a sound .parquet file"),
    "gaps.parquet": (tables([[1.0, 2.0], [1.0, 2.0]], [1, None]), "1 empty entries"),
}
"""Name -> how it is made, and the facts of the message."""


@pytest.mark.parametrize("name", NO_FILES)
def test_what_is_no_file_of_embeddings(name, tmp_path):
    make, words = NO_FILES[name]
    make(tmp_path / name)
    assert words in refused_worker(str(tmp_path / name))


def test_a_file_that_cannot_be_written_ends_all_ranks_alike(tmp_path):
    (said,) = set(harness.run(2, unwritable_worker, str(tmp_path / "nowhere" / "a.npz")))
    assert "cannot write" in said


def unwritable_worker(path: str) -> str:
    table = {"ids": IDS, **COLUMNS}
    with pytest.raises(InputError) as caught:
        embedding_files.write(Path(path), torch.from_numpy(ROWS), torch.from_numpy(IDS), table, "float32")
    return str(caught.value)


# ---- the index of ``embed --index`` ----

UNIT = torch.nn.functional.normalize(torch.from_numpy(ROWS), dim=1)


def index_worker(folder: str) -> None:
    rank, world = collectives.rank(), collectives.world_size()
    table = {"ids": IDS, "keys": COLUMNS["keys"]}
    faiss_index.write(Path(folder) / f"{world}.faiss", UNIT[rank::world], torch.from_numpy(IDS)[rank::world], table)


def test_an_index_answers_as_its_rows_and_is_the_same_on_any_ranks(tmp_path):
    for world in (1, 2, 3):
        harness.run(world, index_worker, str(tmp_path))
    for world in (2, 3):
        for name in ("{}.faiss", "{}.faiss.keys.parquet"):
            assert (tmp_path / name.format(world)).read_bytes() == (tmp_path / name.format(1)).read_bytes()
    found = faiss.read_index(str(tmp_path / "2.faiss"))
    assert (found.ntotal, found.d, found.metric_type) == (N, D, faiss.METRIC_INNER_PRODUCT)
    cosines, ids = found.search(UNIT.numpy(), N)
    np.testing.assert_allclose(cosines[:, 0], 1, atol=1e-6)
    assert ids[:, 0].tolist() == IDS.tolist()
    places = np.searchsorted(IDS, ids)
    np.testing.assert_allclose(np.take_along_axis((UNIT @ UNIT.T).numpy(), places, axis=1), cosines, atol=1e-6)
    np.testing.assert_array_equal(found.reconstruct(int(IDS[7])), UNIT[7])


def test_a_folder_is_searched_by_its_keys(trained, tmp_path):
    run, images = trained / "runs" / "tiny", trained / "images"
    out = tmp_path / "gallery.faiss"
    assert main(["embed", str(run), "--images", str(images), "--index", str(out)]) == 0
    keys = parquet.read_table(f"{out}.keys.parquet").to_pandas().set_index("ids")
    assert list(keys.columns) == ["keys", "labels", "classes"]
    query = images / "class_20" / "5.png"
    _, ids = faiss.read_index(str(out)).search(dist_obdsd.load(run)(query).numpy(), 4)
    assert keys.loc[ids[0][0]]["keys"] == "class_20/5.png"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gallery.faiss", "gallery.faiss.keys.parquet"]


def test_shards_have_their_keys_and_both_files_are_written(trained, tmp_path):
    arguments = ["--shards", str(trained / "packed"), "--index", f"{tmp_path}/a.faiss", "--out", f"{tmp_path}/a.npz"]
    assert main(["embed", str(trained / "runs" / "tiny"), *arguments]) == 0
    keys = parquet.read_table(tmp_path / "a.faiss.keys.parquet").to_pandas()
    with np.load(tmp_path / "a.npz") as archive:
        assert keys["keys"].tolist() == archive["keys"].tolist()
        found = faiss.read_index(str(tmp_path / "a.faiss"))
        np.testing.assert_array_equal(found.reconstruct(int(keys["ids"][9])), archive["embeddings"][9])
    assert set(keys["roles"]) == {"both"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "embed writes --out FILE, --index FILE or both"),
        (["--index", "nowhere/a.faiss"], "folder does not exist"),
        (["--index", "a.npz", "--out", "a.npz"], "both write a.npz"),
        (["--index", "a", "--out", "a.keys.parquet"], "both write a.keys.parquet"),
    ],
)
def test_an_index_that_cannot_be_written_is_one_sentence(trained, tmp_path, arguments, words, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["embed", str(trained / "runs/tiny"), "--images", str(trained / "images"), *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_faiss_the_sentence_says_what_to_do(monkeypatch):
    faiss_index.check_faiss()
    monkeypatch.setattr(faiss_index.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="--index needs faiss"):
        faiss_index.check_faiss()
