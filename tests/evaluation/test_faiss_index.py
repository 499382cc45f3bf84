"""``embed --index``: a faiss index that answers as the embeddings themselves do."""

from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from pyarrow import parquet

import dist_obdsd
from dist_obdsd.cli.main import main
from dist_obdsd.distributed import collectives
from dist_obdsd.evaluation import faiss_index
from tests import harness

N, D = 50, 8


def _rows() -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(N, D, generator=torch.Generator().manual_seed(0)), dim=1)


def _write_share(folder: str) -> None:
    rank, world = collectives.rank(), collectives.world_size()
    ids = torch.arange(N)[rank::world]
    table = {"ids": np.arange(N) + 1000, "keys": np.array([f"k{i}" for i in range(N)])}
    faiss_index.write(Path(folder) / f"{world}.faiss", _rows()[rank::world], ids + 1000, table)


def test_any_number_of_ranks_writes_the_same_index(tmp_path: Path) -> None:
    for world in (1, 2, 3):
        harness.run(world, _write_share, str(tmp_path))
    for world in (2, 3):
        for name in ("{}.faiss", "{}.faiss.keys.parquet"):
            assert (tmp_path / name.format(world)).read_bytes() == (tmp_path / name.format(1)).read_bytes()
    found = faiss.read_index(str(tmp_path / "2.faiss"))
    assert (found.ntotal, found.d, found.metric_type) == (N, D, faiss.METRIC_INNER_PRODUCT)
    rows = _rows()
    cosines, ids = found.search(rows.numpy(), N)
    np.testing.assert_allclose(cosines[:, 0], 1, atol=1e-6)
    assert ids[:, 0].tolist() == list(range(1000, 1000 + N))
    np.testing.assert_allclose(np.take_along_axis((rows @ rows.T).numpy(), ids - 1000, axis=1), cosines, atol=1e-6)
    np.testing.assert_allclose(found.reconstruct(1007), rows[7], atol=0)


def test_a_folder_is_searched_by_its_keys(trained: Path, tmp_path: Path) -> None:
    run, images = trained / "runs" / "tiny", trained / "images"
    out = tmp_path / "gallery.faiss"
    assert main(["embed", str(run), "--images", str(images), "--index", str(out)]) == 0
    keys = parquet.read_table(f"{out}.keys.parquet").to_pandas().set_index("ids")
    assert list(keys.columns) == ["keys", "labels", "classes"]
    query = images / "class_20" / "5.png"
    _, ids = faiss.read_index(str(out)).search(dist_obdsd.load(run)(query).numpy(), 4)
    assert keys.loc[ids[0][0]]["keys"] == "class_20/5.png"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gallery.faiss", "gallery.faiss.keys.parquet"]


def test_shards_have_their_keys_and_both_files_are_written(trained: Path, tmp_path: Path) -> None:
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
def test_bad_input_ends_with_one_sentence(
    trained: Path, tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["embed", str(trained / "runs/tiny"), "--images", str(trained / "images"), *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_faiss_the_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    faiss_index.check_faiss()
    monkeypatch.setattr(faiss_index.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(dist_obdsd.errors.InputError, match="--index needs faiss"):
        faiss_index.check_faiss()
