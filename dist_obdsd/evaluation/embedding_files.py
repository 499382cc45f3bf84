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

import math
import zipfile
from collections.abc import Callable, Iterator, Sequence
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
DTYPES = ("float16", "float32")
COLUMNS = ("ids", "labels", "classes", "roles")
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
    count: int
    """N."""
    class_names: dict[int, str] = field(default_factory=dict)
    """label -> name, where the file says."""


@dataclass(frozen=True)
class Table:
    """Columns about all N images, by ascending id; the same on every rank."""

    ids: np.ndarray
    columns: dict[str, np.ndarray]
    """``labels``, ``classes``, ``roles``, ``keys``: those that are known, N entries each."""


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
        table: of all ranks; every one of its ids must be on some rank.
        dtype: float16 or float32.
        writer: of the file's format; None: as its suffix says, which ``check_suffix`` has accepted.

    Raises:
        InputError: on every rank: the file cannot be written.
    """
    dim = max([dim for n, dim in collectives.gather_json(list(rows_nD.shape)) if n], default=0)
    rows_nD = rows_nD if rows_nD.shape[0] else rows_nD.new_empty(0, dim)
    blocks = _blocks(rows_nD, ids_n, torch.from_numpy(table.ids), dtype)
    failure: Exception | None = None
    try:
        if collectives.rank() == 0:
            with replacing(path) as file:
                (writer or _WRITERS[path.suffix])(file, table, dim, dtype, blocks)
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
        together = rows.new_full((block.numel(), rows.shape[1]), torch.nan)
        together[torch.searchsorted(block, ids)] = rows
        yield together.numpy().astype(dtype)


def _write_npz(file: BinaryIO, table: Table, dim: int, dtype: str, blocks: Iterator[np.ndarray]) -> None:
    # As numpy.savez does, but the embeddings row by row; zipfile dates members 1980 unless told otherwise.
    with zipfile.ZipFile(file, "w") as archive:
        for name, column in {"ids": table.ids, **table.columns}.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, column, allow_pickle=False)
        with archive.open("embeddings.npy", "w", force_zip64=True) as member:
            header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (len(table.ids), dim)}
            np.lib.format.write_array_header_1_0(member, header)
            for rows in blocks:
                member.write(rows.tobytes())


def _write_parquet(file: BinaryIO, table: Table, dim: int, dtype: str, blocks: Iterator[np.ndarray]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    columns = {name: pa.array(column) for name, column in {"ids": table.ids, **table.columns}.items()}
    kind = pa.list_(pa.from_numpy_dtype(np.dtype(dtype)), dim)
    schema = pa.schema([*((name, column.type) for name, column in columns.items()), ("embeddings", kind)])
    start = 0
    with parquet.ParquetWriter(file, schema) as writer:
        for rows in blocks:
            part = {name: column.slice(start, len(rows)) for name, column in columns.items()}
            part["embeddings"] = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), type=kind)
            writer.write_table(pa.table(part, schema=schema))
            start += len(rows)


_WRITERS: dict[str, Writer] = {".npz": _write_npz, ".parquet": _write_parquet}


# ---- reading ----


def read(path: Path) -> Embeddings:
    """Read this rank's share of a file. Collective.

    Every rank reads the short columns and of the embeddings only its own rows.

    Raises:
        InputError: on every rank: the file is missing, not of its format or lacks what is needed; columns differ in
            length; an id occurs twice.
    """
    with raise_on_all_ranks(f"reading {path}"):
        check_suffix(path)
        try:
            read_file(path, 1)  # a named pipe would keep the readers waiting for ever
            columns, rows, total, start = _READERS[path.suffix](path)
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"cannot read {path}: {reason}; give the path of an embeddings file") from error
        except (ValueError, KeyError, zipfile.BadZipFile) as error:  # pyarrow's errors are ValueErrors
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{path} is not a sound {path.suffix} file of embeddings: {reason}") from error
        if not total:
            raise InputError(f"{path} has no embeddings; embed some images first")
        if rows.dtype.kind != "f" or rows.ndim != 2:
            raise InputError(
                f"{path} has embeddings of type {rows.dtype} and shape {rows.shape}; they must be float16, float32 or "
                f"float64, one row of D numbers per image"
            )
        if not {"labels", "classes"} & columns.keys():
            raise InputError(f"{path} has neither labels nor classes, so nothing can be measured; add one of them")
        for name, column in columns.items():
            if column.shape != (total,):
                raise InputError(
                    f"{path} has {total} embeddings but {name} of shape {column.shape}; it needs {total} entries"
                )
            if name in ("roles", "classes") and column.dtype.kind not in ("U" if name == "roles" else "Uiu"):
                raise InputError(f"{path} has {name} of type {column.dtype}; they must be texts")
        ids = _integers(path, "ids", columns.get("ids", np.arange(total)))
        distinct, counts = np.unique(ids, return_counts=True)
        if len(distinct) < total:
            twice = distinct[counts > 1]
            raise InputError(
                f"{path} has {len(twice)} ids more than once, the first is {twice[0]}; give each image its own"
            )
        labels, class_names = _labels(path, columns)
        own = slice(start, start + len(rows))
        return Embeddings(
            torch.from_numpy(rows if rows.dtype == np.float64 else rows.astype(np.float32)),
            torch.from_numpy(ids[own]),
            torch.from_numpy(labels[own]),
            columns["roles"][own].tolist() if "roles" in columns else ["both"] * len(rows),
            total,
            class_names,
        )
    raise AssertionError("raise_on_all_ranks raises what the block raised")


def _share(total: int) -> tuple[int, int]:
    """First row of this rank, and of the next one."""
    rank, world = collectives.rank(), collectives.world_size()
    return total * rank // world, total * (rank + 1) // world


def _integers(path: Path, name: str, column: np.ndarray) -> np.ndarray:
    if column.dtype.kind not in "iu":
        raise InputError(f"{path} has {name} of type {column.dtype}; they must be integers")
    return column.astype(np.int64)


def _labels(path: Path, columns: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[int, str]]:
    """Return int64 labels [N], and their names where the file has any."""
    named = columns.get("classes")
    labels = columns["labels"] if "labels" in columns else columns["classes"]
    if labels.dtype.kind == "U":
        names, labels = np.unique(labels, return_inverse=True)
        return labels.astype(np.int64), dict(enumerate(names.tolist()))
    labels = _integers(path, "labels", labels)
    if named is None:
        return labels, {}
    values, first = np.unique(labels, return_index=True)
    return labels, dict(zip(values.tolist(), named[first].tolist(), strict=True))


Read = tuple[dict[str, np.ndarray], np.ndarray, int, int]
"""(columns of all rows, embeddings of this rank's rows, number of all rows, this rank's first row)."""


def _read_npz(path: Path) -> Read:
    with zipfile.ZipFile(path) as archive:

        def array(name: str) -> np.ndarray:
            with archive.open(f"{name}.npy") as member:
                return np.lib.format.read_array(member, allow_pickle=False)

        names = [name.removesuffix(".npy") for name in archive.namelist()]
        columns = {name: array(name) for name in COLUMNS if name in names}
        _check_names(names)
        with archive.open("embeddings.npy") as member:
            version = np.lib.format.read_magic(member)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, by_columns, dtype = header(member)
            start, stop = _share(shape[0])
            if by_columns or dtype.kind != "f":
                return columns, array("embeddings")[start:stop], shape[0], start
            row = math.prod(shape[1:]) * dtype.itemsize
            member.seek(start * row, 1)
            rows = np.frombuffer(member.read((stop - start) * row), dtype).reshape(stop - start, *shape[1:])
            return columns, rows, shape[0], start


def _read_parquet(path: Path) -> Read:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        names, total = file.schema_arrow.names, file.metadata.num_rows
        _check_names(names)
        columns = {}
        for name in [name for name in COLUMNS if name in names]:
            column = file.read([name]).column(0)
            if column.null_count:
                raise ValueError(f"{name} has {column.null_count} empty entries")
            array = column.to_numpy()
            columns[name] = array.astype(str) if array.dtype == object and isinstance(array[0], str) else array
        (start, stop), at, parts = _share(total), 0, [np.empty((0, 0), np.float32)]
        for batch in file.iter_batches(BLOCK, columns=["embeddings"]):
            own = batch.column(0)[max(start - at, 0) : max(stop - at, 0)]
            parts += [np.stack(own.to_numpy(zero_copy_only=False))] if len(own) else []
            at += len(batch)
        return columns, np.concatenate(parts[1:] or parts), total, start


def _check_names(names: Sequence[str]) -> None:
    if "embeddings" not in names:
        raise ValueError(f"it has no embeddings, only {', '.join(sorted(names)) or 'nothing'}")


_READERS: dict[str, Callable[[Path], Read]] = {".npz": _read_npz, ".parquet": _read_parquet}
