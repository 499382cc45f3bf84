"""Rows of text from text tables and MATLAB files; nothing in them is executed."""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dist_obdsd.data.packing.sources import File
from dist_obdsd.errors import InputError


@dataclass(frozen=True)
class Row:
    file: File
    place: str
    """The line or the element in the file."""
    cells: dict[str, str]

    @property
    def where(self) -> str:
        return f"{self.file.where}{self.place}"


def text_rows(file: File, delimiter: str, skip: int, columns: Sequence[str]) -> tuple[tuple[str, ...], Iterator[Row]]:
    """Read a text table, its columns' names and its rows, without blank lines.

    Args:
        delimiter: between two cells, as in CSV; "" for white space.
        skip: lines before the table.
        columns: their names; where there are none, the table's first row gives them.

    Raises:
        InputError: it is no text, or has no names of columns. A row that cannot be used raises one when its turn comes.
    """
    data = _read(file)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{file.where}:{line}: is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    lines = _lines(file, text, delimiter, skip)
    names = tuple(columns)
    if not names:
        number, cells = next(lines, (skip + 1, []))
        names = tuple(cell.strip() for cell in cells)
        if not names or len(set(names)) < len(names):
            raise InputError(f"{file.where}:{number}: has no row of column names, all different; add it there")
    return names, _named(file, lines, names)


def _lines(file: File, text: str, delimiter: str, skip: int) -> Iterator[tuple[int, list[str]]]:
    """Split the lines: (line number, from 1, and cells)."""
    stream = io.StringIO(text, newline="")
    for _ in range(skip):
        stream.readline()
    if not delimiter:
        yield from ((number, cells) for number, line in enumerate(stream, skip + 1) if (cells := line.split()))
        return
    reader = csv.reader(stream, delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield skip + reader.line_num, cells
    except csv.Error as error:
        raise InputError(f"{file.where}:{skip + reader.line_num}: is no row of a table ({error}); mend it") from error


def _named(file: File, lines: Iterator[tuple[int, list[str]]], names: tuple[str, ...]) -> Iterator[Row]:
    for number, cells in lines:
        if len(cells) != len(names):
            raise InputError(
                f"{file.where}:{number}: has {len(cells)} cells but needs {len(names)} ({', '.join(names)}); "
                f"mend the line"
            )
        yield Row(file, f":{number}", {name: cell.strip() for name, cell in zip(names, cells, strict=True)})


def matlab_rows(file: File, variable: str) -> tuple[tuple[str, ...], Iterator[Row]]:
    """Read a struct array of a MATLAB file: an element is a row, a field a column."""
    records = matlab_variable(file, variable)
    if not (names := records.dtype.names):
        raise InputError(f"{file.where}: the variable {variable} is no struct array, so it lists no images")
    rows = (
        Row(file, f", {variable}({number})", {name: _text(record[name]) for name in names})
        for number, record in enumerate(records, 1)  # as MATLAB counts
    )
    return names, rows


def matlab_variable(file: File, variable: str) -> np.ndarray:
    """Read an array of a MATLAB file."""
    from scipy.io import loadmat  # takes a quarter of a second to import, which text tables do without

    data = _read(file)
    try:
        found = loadmat(io.BytesIO(data), variable_names=[variable], squeeze_me=True)
    except Exception as error:  # the parser raises whatever it trips over
        raise InputError(f"{file.where} is no MATLAB file that can be read ({error}); download it again") from error
    if variable not in found:
        raise InputError(f"{file.where} has no variable {variable}; download it again")
    return np.atleast_1d(found[variable])


def _read(file: File) -> bytes:
    try:
        return file.read()
    except OSError as error:
        raise InputError(f"cannot read {file.where}: {error.strerror}; download it again") from error


def _text(value: Any) -> str:
    """Return a field's text or whole number; "", which counts as missing, for others."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, int | float | np.number) and float(value).is_integer():
        return str(int(value))
    return ""
