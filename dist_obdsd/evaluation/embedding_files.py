"""Files of embeddings, which ``embed`` writes and ``evaluate`` reads.

One row per image, as NumPy arrays (``.npz``) or as columns of a table (``.parquet``), under the same names::

    embeddings  float16, float32 or float64 [N, D]; in Parquet a list of D numbers per row       needed
    ids         integers, each once; where they are missing, the row numbers stand for them
    labels      integers, or texts that name the class                                           needed to evaluate
    classes     texts, the names of the labels; labels may be left out where these are given
    roles       texts: both (the default), query, gallery or gallery:NAME
    keys        texts: an image's path, or its key in its shard

Other arrays or columns are left alone. Nothing in a file can execute: arrays of Python objects are refused.

Shapes: n images of this rank, N of all ranks, D embedding dimension.
"""

import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from dist_obdsd.distributed import collectives
from dist_obdsd.distributed.failures import raise_on_all_ranks
from dist_obdsd.errors import InputError
from dist_obdsd.files import read_file, replacing

SUFFIXES = (".npz", ".parquet")
COLUMNS = {
    "ids": ("iu", "integers"), "labels": ("iuU", "integers"), "classes": ("Uiu", "texts"), "roles": ("U", "texts"),
}  # fmt: skip
"""What evaluations read beside the embeddings: the kinds of dtype that are allowed, and those in words."""
BLOCK = 16384  # rows read, gathered or written at a time


@dataclass(frozen=True)
class Embeddings:
    """This rank's part of a file."""

    rows_nD: torch.Tensor
    """[n, D] float32, or float64 where the file has it."""
    ids_n: torch.Tensor
    labels_n: torch.Tensor
    """int64, numbered by name where the file has texts."""
    roles: list[str]
    class_names: dict[int, str] = field(default_factory=dict)
    """label -> name, where the file says."""


Table = dict[str, np.ndarray]
"""``ids`` of all N images, ascending, and where known ``labels``, ``classes``, ``roles``, ``keys``."""


def check_suffix(path: Path) -> None:
    """Raises: InputError: the file's name says no format that is known."""
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path} ends in {path.suffix or 'no suffix'!r}; embeddings are {' or '.join(SUFFIXES)} files")


# ---- writing ----

Writer = Callable[[BinaryIO, Table, int, str, Iterator[np.ndarray]], None]
"""Writes (file, table, D, dtype, blocks of rows by ascending id)."""


def write(
    path: Path, rows_nD: torch.Tensor, ids_n: torch.Tensor, table: Table, dtype: str, writer: Writer | None = None
) -> None:
    """Write one file, by ascending id; the same bytes on any ranks. Collective.

    Rows come to the writing rank in blocks, so no rank holds more than its share and a block.

    Args:
        rows_nD: this rank's embeddings; an id may be on several ranks.
        table: the same on every rank; every one of its ids must be on some rank.
        dtype: float16 or float32.
        writer: None: as the suffix says, which ``check_suffix`` has accepted.

    Raises:
        InputError: on every rank: the file cannot be written.
    """
    dim = max(dim for _, dim in collectives.gather_json(list(rows_nD.shape)))  # where a rank has no rows, 0
    rows_nD = rows_nD if len(rows_nD) else rows_nD.new_empty(0, dim)
    blocks = _blocks(rows_nD, ids_n, torch.from_numpy(table["ids"]), dtype)
    failure: Exception | None = None
    try:
        if collectives.rank() == 0:
            with replacing(path) as file:
                (writer or (_write_npz if path.suffix == ".npz" else _write_parquet))(file, table, dim, dtype, blocks)
    except OSError as error:
        failure = error
    for _ in blocks:  # the other ranks only send, and so does a writer that failed
        pass
    with raise_on_all_ranks("writing the embeddings"):
        if failure is not None:
            raise InputError(f"cannot write {path}: {failure}; free some space or choose another file") from failure


def _blocks(rows_nD: torch.Tensor, ids_n: torch.Tensor, ids_N: torch.Tensor, dtype: str) -> Iterator[np.ndarray]:
    """Rows of all ranks, block by block of ascending ids. Collective at every step."""
    for block in ids_N.split(BLOCK):
        own = (ids_n >= block[0]) & (ids_n <= block[-1])
        ids, rows = collectives.gather_ragged(ids_n[own]), collectives.gather_ragged(rows_nD[own])
        together = rows.new_full((len(block), rows.shape[1]), torch.nan)
        together[torch.searchsorted(block, ids)] = rows
        yield together.numpy().astype(dtype)


def _write_npz(file: BinaryIO, table: Table, dim: int, dtype: str, blocks: Iterator[np.ndarray]) -> None:
    # As numpy.savez does, but the embeddings row by row; zipfile dates members 1980 unless told otherwise.
    with zipfile.ZipFile(file, "w") as archive:
        for name, column in table.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, column, allow_pickle=False)
        with archive.open("embeddings.npy", "w", force_zip64=True) as member:
            header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (len(table["ids"]), dim)}
            np.lib.format.write_array_header_1_0(member, header)
            for rows in blocks:
                member.write(rows.tobytes())


def _write_parquet(file: BinaryIO, table: Table, dim: int, dtype: str, blocks: Iterator[np.ndarray]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    columns = pa.table(table)
    kind = pa.list_(pa.from_numpy_dtype(np.dtype(dtype)), dim)
    start = 0
    with parquet.ParquetWriter(file, columns.schema.append(pa.field("embeddings", kind))) as writer:
        for rows in blocks:
            embeddings = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), type=kind)
            writer.write_table(columns.slice(start, len(rows)).append_column("embeddings", embeddings))
            start += len(rows)


# ---- reading ----


def read(path: Path) -> Embeddings:
    """Read this rank's share of a file. Collective.

    Raises:
        InputError: on every rank: the file is missing, not of its format or lacks what is needed; columns differ in
            length; an id occurs twice.
    """
    found: Embeddings | None = None
    with raise_on_all_ranks(f"reading {path}"):
        check_suffix(path)
        try:
            read_file(path, 1)  # a named pipe would keep the readers waiting for ever
            columns, rows, own, total = (_read_npz if path.suffix == ".npz" else _read_parquet)(path)
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"cannot read {path}: {reason}; give the path of an embeddings file") from error
        except (ValueError, KeyError, zipfile.BadZipFile) as error:  # pyarrow's errors are ValueErrors
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{path} is not a sound {path.suffix} file of embeddings: {reason}") from error
        _check(path, columns, rows, total)
        labels = columns["labels" if "labels" in columns else "classes"]
        values, first, numbers = np.unique(labels, return_index=True, return_inverse=True)
        texts = values.dtype.kind == "U"
        names = values if texts else columns["classes"][first] if "classes" in columns else ()
        found = Embeddings(
            torch.from_numpy(rows if rows.dtype == np.float64 else rows.astype(np.float32)),
            torch.from_numpy(columns["ids"][own].astype(np.int64)) if "ids" in columns else torch.arange(total)[own],
            torch.from_numpy((numbers if texts else labels)[own].astype(np.int64)),
            columns["roles"][own].tolist() if "roles" in columns else ["both"] * len(rows),
            dict(zip(range(len(values)) if texts else values.tolist(), map(str, names), strict=False)),
        )
    assert found is not None  # or the block would have raised
    return found


def _check(path: Path, columns: dict[str, np.ndarray], rows: np.ndarray, total: int) -> None:
    if not total:
        raise InputError(f"{path} has no embeddings; embed some images first")
    if rows.dtype.kind != "f" or rows.ndim != 2:
        raise InputError(
            f"{path} has embeddings of type {rows.dtype} and shape {rows.shape}; they must be float16, float32 or "
            f"float64, one row of D numbers per image"
        )
    for name, column in columns.items():
        if column.shape != (total,):
            raise InputError(
                f"{path} has {total} embeddings but {name} of shape {column.shape}; it needs {total} entries"
            )
        kinds, words = COLUMNS[name]
        if column.dtype.kind not in kinds:
            raise InputError(f"{path} has {name} of type {column.dtype}; they must be {words}")
    if "ids" in columns:
        distinct, counts = np.unique(columns["ids"], return_counts=True)
        if len(twice := distinct[counts > 1]):
            raise InputError(
                f"{path} has {len(twice)} ids more than once, the first is {twice[0]}; give each image its own"
            )
    if not {"labels", "classes"} & columns.keys():
        raise InputError(f"{path} has neither labels nor classes, so nothing can be measured; add one of them")


Read = tuple[dict[str, np.ndarray], np.ndarray, slice, int]
"""(columns of all rows, embeddings of this rank's rows, which those are, number of all rows)."""


def _share(names: list[str], total: int) -> tuple[list[str], slice]:
    """The columns to read, and the rows of this rank."""
    if "embeddings" not in names:
        raise ValueError(f"it has no embeddings, only {', '.join(sorted(names)) or 'nothing'}")
    rank, world = collectives.rank(), collectives.world_size()
    return [name for name in COLUMNS if name in names], slice(total * rank // world, total * (rank + 1) // world)


def _read_npz(path: Path) -> Read:
    with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as arrays:  # else any pickle might be named so
        rows = np.atleast_1d(arrays["embeddings"]) if "embeddings" in arrays else np.empty(0)
        names, own = _share(list(arrays), len(rows))
        return {name: arrays[name] for name in names}, rows[own], own, len(rows)


def _read_parquet(path: Path) -> Read:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        names, own = _share(file.schema_arrow.names, file.metadata.num_rows)
        columns = {}
        for name in names:
            column = file.read([name]).column(0)
            if column.null_count:
                raise ValueError(f"{name} has {column.null_count} empty entries")
            array = column.to_numpy()
            columns[name] = array.astype(str) if isinstance(next(iter(array), ""), str) else array
        at, parts = 0, [np.empty((0, 0), np.float32)]
        for batch in file.iter_batches(BLOCK, columns=["embeddings"]):
            rows = batch.column(0)[max(own.start - at, 0) : max(own.stop - at, 0)]
            parts += [np.stack(rows.to_numpy(zero_copy_only=False))] if len(rows) else []
            at += len(batch)
        return columns, np.concatenate(parts[1:] or parts), own, at
