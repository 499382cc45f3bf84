"""A batch's rows: encoded images, and what becomes of them."""

from typing import NamedTuple

import numpy as np
from torch import Tensor

from dist_obdsd.config import Config
from dist_obdsd.data.transforms import Frame, decode, eval_transform, jpeg_size, train_frame, train_transform
from dist_obdsd.rng import rng


class Row(NamedTuple):
    """One image to decode."""

    id: int
    data: bytes
    place: tuple[int, int, int] | None
    """(epoch, step, global row), which the augmentation is drawn from; None: as in evaluation."""


class Bad(NamedTuple):
    """A row that could not be decoded."""

    row: int
    id: int
    reason: str
    replacement: int | None
    """The image of the same group that stands in its row; None when there is none."""


class Left(NamedTuple):
    """A row that was left to a GPU's decoder."""

    row: int
    size: tuple[int, int]
    """Height and width of the whole image."""
    frame: Frame
    """What is to be taken of the image."""


class Part(NamedTuple):
    """What became of some of a job's rows."""

    bad: list[Bad]
    left: list[Left]

    def moved(self, start: int) -> "Part":
        """The same, of rows from ``start`` on."""
        return Part(
            [bad._replace(row=bad.row + start) for bad in self.bad],
            [left._replace(row=left.row + start) for left in self.left],
        )


def decode_rows(rows: list[Row], out: Tensor, config: Config, group: int, leave: bool = False) -> Part:
    """Decode and transform ``rows`` into ``out`` [at least len(rows), C, s, s].

    Args:
        group: a broken image is replaced by the next good one of its ``group`` consecutive rows (1: never).
        leave: do not decode the JPEGs that a GPU's decoder can be given.
    """
    part = Part([], [])
    # All generators at once: among the decoding, code and tables that they need would be out of the cache every time.
    generators = [generator_of(row, config) for row in rows]
    for i, generator in enumerate(generators):
        if leave and generator is not None and (size := jpeg_size(rows[i].data)):
            part.left.append(Left(i, size, train_frame(*size, config.data, generator)))
        elif bad := decode_row(rows, i, generator, out[i], config, group):
            part.bad.append(bad)
    return part


def generator_of(row: Row, config: Config) -> np.random.Generator | None:
    """What the row's random parameters are drawn from, anew with every call; None: as in evaluation."""
    return None if row.place is None else rng(config.seed, "augment", *row.place)


def decode_row(
    rows: list[Row], i: int, generator: np.random.Generator | None, out: Tensor, config: Config, group: int
) -> Bad | None:
    """Decode and transform row i into ``out`` [C, s, s], or what replaces it (see ``decode_rows``)."""
    row, start = rows[i], i - i % group
    members = [row, *(other for other in rows[start : start + group] if other.id != row.id)]
    reason = ""
    for member in members:
        try:
            image = decode(member.data, config.data.channels)
        except ValueError as error:
            reason = reason or str(error)
            continue
        if generator is None:
            out.copy_(eval_transform(image, config.data))
        else:
            out.copy_(train_transform(image, config.data, generator))
        return None if member.id == row.id else Bad(i, row.id, reason, member.id)
    return Bad(i, row.id, reason, None)
