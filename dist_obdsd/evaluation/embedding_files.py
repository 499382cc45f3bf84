"""Files of embeddings: what ``dist-obdsd embed`` writes and ``dist-obdsd evaluate --embeddings`` reads.

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

import hashlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from dist_obdsd.distributed import collectives
from dist_obdsd.distributed.failures import raise_on_all_ranks
from dist_obdsd.errors import InputError
from dist_obdsd.files import replacing

SUFFIXES = (".npz", ".parquet")
DTYPES = ("float16", "float32")
TEXTS = ("classes", "roles", "keys")
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
    """What is known of all N images beside their embeddings, by ascending id; the same on every rank."""

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
    path: Path,
    rows_nD: torch.Tensor,
    ids_n: torch.Tensor,
    table: Table,
    dtype: str,
    writer: Writer | None = None,
) -> None:
    """Write one file, by ascending id, whole or not at all. Collective; the same bytes for any number of ranks.

    Rows come to the writing rank in blocks, so no rank holds more than its share and a block.

    Args:
        rows_nD: this rank's embeddings; an id may be on several ranks.
        table: of all ranks; every one of its ids must be on some rank.
        dtype: float16 or float32.
        writer: of the file's format; None: as its suffix says.

    Raises:
        InputError: on every rank: the suffix is unknown, or the file cannot be written.
    """
    dims = sorted({dim for n, dim in collectives.gather_json(list(rows_nD.shape)) if n})
    dim = dims[-1] if dims else 0
    rows_nD = rows_nD if rows_nD.shape[0] else rows_nD.new_empty(0, dim)
    failure: Exception | None = None
    ids_N = torch.from_numpy(table.ids)
    blocks = _blocks(rows_nD, ids_n, ids_N, dtype)
    if writer is None:
        with raise_on_all_ranks("writing the embeddings"):
            check_suffix(path)
        writer = _WRITERS[path.suffix]
    try:
        if collectives.rank() == 0:
            with replacing(path) as file:
                writer(file, table, dim, dtype, blocks)
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
            length; an id occurs twice; an embedding is NaN or infinite.
    """
    with raise_on_all_ranks(f"reading {path}"):
        check_suffix(path)
        with _open(path) as source:
            names = source.names
            if "embeddings" not in names:
                raise InputError(f"{path} has no embeddings; it has {', '.join(sorted(names)) or 'nothing'}")
            if not {"labels", "classes"} & names:
                raise InputError(f"{path} has neither labels nor classes, so nothing can be measured; add one of them")
            total = source.shape()[0]
            columns = {name: source.column(name) for name in ("ids", "labels", *TEXTS) if name in names}
            for name, column in columns.items():
                if column.shape != (total,):
                    raise InputError(
                        f"{path} has {total} embeddings but {name} of shape {column.shape}; it needs {total} entries"
                    )
            ids = _integers(path, "ids", columns.get("ids", np.arange(total)))
            _check_unique(path, ids)
            labels, class_names = _labels(path, columns)
            roles = columns["roles"].tolist() if "roles" in columns else ["both"] * total
            share = [total * r // collectives.world_size() for r in (collectives.rank(), collectives.rank() + 1)]
            rows = source.rows(*share)
        if rows.dtype.kind != "f":
            raise InputError(f"{path} has embeddings of type {rows.dtype}; they must be float16, float32 or float64")
        finite = np.isfinite(rows).all(axis=1)
        if not finite.all():
            first = share[0] + int(np.flatnonzero(~finite)[0])
            raise InputError(
                f"{path} has NaN or infinite embeddings, {int((~finite).sum())} of rows {share[0]} to {share[1] - 1}, "
                f"the first in row {first}, id {ids[first]}; embed these images again or leave them out"
            )
        own = slice(*share)
        rows_nD = torch.from_numpy(rows if rows.dtype == np.float64 else rows.astype(np.float32))
        return Embeddings(
            rows_nD, torch.from_numpy(ids[own]), torch.from_numpy(labels[own]), roles[own], total, class_names
        )
    raise AssertionError  # agree() raises whatever the block raised


def _integers(path: Path, name: str, column: np.ndarray) -> np.ndarray:
    if column.dtype.kind not in "iu":
        raise InputError(f"{path} has {name} of type {column.dtype}; they must be integers")
    return column.astype(np.int64)


def _check_unique(path: Path, ids: np.ndarray) -> None:
    distinct, counts = np.unique(ids, return_counts=True)
    if len(distinct) < len(ids):
        twice = distinct[counts > 1]
        raise InputError(
            f"{path} has {len(twice)} ids more than once, the first is {twice[0]}; give each image its own"
        )


def _labels(path: Path, columns: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[int, str]]:
    """int64 [N], and their names where the file has any."""
    named = columns.get("classes")
    labels = columns.get("labels", named)
    assert labels is not None
    if labels.dtype.kind == "U":
        names, labels = np.unique(labels, return_inverse=True)
        return labels.astype(np.int64), dict(enumerate(names.tolist()))
    labels = _integers(path, "labels", labels)
    if named is None:
        return labels, {}
    values, first = np.unique(labels, return_index=True)
    return labels, dict(zip(values.tolist(), named[first].tolist(), strict=True))


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with _READERS[path.suffix](path) as source:
            yield source
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror or error}; give the path of an embeddings file"
        ) from error
    except (ValueError, zipfile.BadZipFile) as error:  # pyarrow's errors are ValueErrors
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is not a sound {path.suffix} file of embeddings: {reason}") from error


class _Npz:
    def __init__(self, path: Path) -> None:
        self.archive = zipfile.ZipFile(path)
        self.names = {name.removesuffix(".npy") for name in self.archive.namelist()}

    def __enter__(self) -> "_Npz":
        return self

    def __exit__(self, *_: object) -> None:
        self.archive.close()

    def column(self, name: str) -> np.ndarray:
        with self.archive.open(f"{name}.npy") as member:
            return np.lib.format.read_array(member, allow_pickle=False)

    def shape(self) -> tuple[int, int]:
        with self.archive.open("embeddings.npy") as member:
            return self._header(member)[0]

    def rows(self, start: int, stop: int) -> np.ndarray:
        with self.archive.open("embeddings.npy") as member:
            (_, dim), by_columns, dtype = self._header(member)
            if by_columns or dtype.kind != "f":
                return self.column("embeddings")[start:stop]
            member.seek(start * dim * dtype.itemsize, 1)
            data = member.read((stop - start) * dim * dtype.itemsize)
        return np.frombuffer(data, dtype).reshape(stop - start, dim)

    def _header(self, member: Any) -> tuple[tuple[int, int], bool, np.dtype]:
        version = np.lib.format.read_magic(member)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_columns, dtype = read_header(member)
        if len(shape) != 2:
            raise ValueError(f"embeddings have shape {shape}; they must be one row of D numbers per image")
        return shape, by_columns, dtype


class _Parquet:
    def __init__(self, path: Path) -> None:
        from pyarrow import parquet

        self.file = parquet.ParquetFile(path)
        self.names = set(self.file.schema_arrow.names)

    def __enter__(self) -> "_Parquet":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def column(self, name: str) -> np.ndarray:
        column = self.file.read([name]).column(0)
        if column.null_count:
            raise ValueError(f"{name} has {column.null_count} empty entries")
        array = column.to_numpy()
        return array.astype(str) if array.dtype == object else array

    def shape(self) -> tuple[int, int]:
        first = self.rows(0, min(1, self.file.metadata.num_rows))
        return self.file.metadata.num_rows, first.shape[1]

    def rows(self, start: int, stop: int) -> np.ndarray:
        parts, at = [], 0
        for batch in self.file.iter_batches(BLOCK, columns=["embeddings"]):
            part = batch.column(0)[max(start - at, 0) : max(stop - at, 0)]
            at += len(batch)
            if len(part):
                parts.append(self._matrix(part))
            if at >= stop:
                break
        return np.concatenate(parts) if parts else np.empty((0, 0), np.float32)

    def _matrix(self, column: Any) -> np.ndarray:
        numbers = getattr(column, "flatten", lambda: None)()
        if numbers is None or column.null_count or numbers.null_count or len(numbers) % len(column):
            raise ValueError("embeddings must be a list of D numbers in every row")
        matrix = numbers.to_numpy().reshape(len(column), -1)
        lengths = column.value_lengths().to_numpy() if hasattr(column, "value_lengths") else matrix.shape[1]
        if not np.all(lengths == matrix.shape[1]):
            raise ValueError("embeddings have different lengths in different rows")
        return matrix


_READERS: dict[str, Callable[[Path], Any]] = {".npz": _Npz, ".parquet": _Parquet}


def digest(texts: Sequence[str]) -> str:
    """What ranks compare to know that they see the same files."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()
