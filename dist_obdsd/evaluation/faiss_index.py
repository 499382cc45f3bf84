"""A gallery as a faiss index: what ``dist-obdsd embed --index`` writes.

``gallery.faiss`` is an exact index of inner products (the cosines of unit rows) that answers with the images' ids.
``gallery.faiss.keys.parquet`` beside it says what they stand for: ``ids``, ``keys`` (paths, or keys in the shards) and
where known ``labels``, ``classes`` and ``roles``, by ascending id::

    index = faiss.read_index("gallery.faiss")
    keys = pyarrow.parquet.read_table("gallery.faiss.keys.parquet").to_pandas().set_index("ids")
    cosines, ids = index.search(embedder(images).numpy(), 10)
    print(keys.loc[ids[0]], cosines[0])
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from dist_obdsd.errors import InputError
from dist_obdsd.evaluation import embedding_files
from dist_obdsd.evaluation.embedding_files import Table
from dist_obdsd.files import replacing


def keys_path(path: Path) -> Path:
    """The file of keys that belongs to an index."""
    return path.with_name(path.name + ".keys.parquet")


def check_faiss() -> None:
    """Raises: InputError: faiss is not installed."""
    if importlib.util.find_spec("faiss") is None:
        raise InputError(
            "--index needs faiss, which is not installed; pip install faiss-cpu, or write the embeddings with --out"
        )


def write(path: Path, rows_nD: torch.Tensor, ids_n: torch.Tensor, table: Table) -> None:
    """Write an index and its keys, as ``embedding_files.write`` does. Collective.

    Raises:
        InputError: on every rank: a file cannot be written.
    """

    def write_index(file: BinaryIO, table: Table, dim: int, dtype: str, blocks: Iterator[np.ndarray]) -> None:
        import faiss
        import pyarrow as pa
        from pyarrow import parquet

        with replacing(keys_path(path)) as keys:  # first: who sees the index finds its keys
            parquet.write_table(pa.table(table), keys)
        index, start = faiss.IndexIDMap2(faiss.IndexFlatIP(dim)), 0
        for rows in blocks:
            index.add_with_ids(rows, table["ids"][start : start + len(rows)])
            start += len(rows)
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))  # type: ignore[attr-defined]

    embedding_files.write(path, rows_nD, ids_n, table, "float32", write_index)
