"""Readers: from a data set as it is downloaded to (image, class, split, role), in an order fixed by the names.

A reader lists its samples first and reads an image's bytes only when asked, so that a large set is never in memory.
There is one for every kind of layout; what differs between two data sets of a kind is options, which recipes hold.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from dist_obdsd.data.packing.readers.base import (
    IMAGE_SUFFIXES,
    FileOptions,
    Lack,
    Options,
    Sample,
    default_role,
    refuse,
)
from dist_obdsd.data.packing.readers.folder import FolderOptions, read_folder
from dist_obdsd.data.packing.readers.table import TableOptions, read_table
from dist_obdsd.data.packing.sources import Tree
from dist_obdsd.errors import InputError

__all__ = ["IMAGE_SUFFIXES", "READERS", "Options", "Sample", "open_samples", "refuse"]


class GlyphsOptions(Options):
    variants: Annotated[int, Field(ge=1, le=16)] = 2
    """Images of a letter in a face, at different sizes and places."""
    draw_seed: Annotated[int, Field(ge=0)] = 0
    """Of the sizes and places."""


@contextmanager
def open_samples(
    reader: str, options: Options, source: Path | None, lack: Lack = refuse, scratch: Path | None = None
) -> Iterator[list[Sample]]:
    """The samples of a source, training before test, each split by class and name. Archives stay open meanwhile.

    Args:
        reader: a name in READERS.
        options: checked by READERS[reader].
        source: the download: its folder or an archive; None for a reader that draws its images itself.
        lack: called with what the source should hold and does not.
        scratch: folder for the temporary file that a compressed tar is unpacked into; None lets the system choose.

    Raises:
        InputError: the source is missing, superfluous or not laid out as the reader needs.
        RunError: there is no room for the temporary file.
    """
    if not isinstance(options, FileOptions):
        if source is not None:
            raise InputError(f"the reader {reader} draws its images itself and cannot use {source}; leave --source out")
        samples = READERS[reader].read(None, options, lack)
        yield _sorted(samples)
        return
    if source is None:
        raise InputError(f"the reader {reader} needs the downloaded data; give its folder or archive with --source")
    with ExitStack() as stack:
        tree = Tree(source, options.archives, scratch, stack)
        yield _sorted(READERS[reader].read(tree, options, lack))


def _sorted(samples: list[Sample]) -> list[Sample]:
    return sorted(samples, key=lambda s: (s.split != "train", s.split, s.class_name, s.name))


def _draw_glyphs(tree: Any, options: GlyphsOptions, lack: Lack) -> list[Sample]:
    from dist_obdsd.data.packing.glyphs import draw_glyphs

    return [
        Sample(name, class_name, split, default_role(split), partial(bytes, png))
        for name, class_name, split, png in draw_glyphs(options.draw_seed, options.variants)
    ]


@dataclass(frozen=True)
class Reader:
    options: type[Options]
    read: Callable[[Any, Any, Lack], list[Sample]]


READERS = {
    "glyphs": Reader(GlyphsOptions, _draw_glyphs),
    "folder": Reader(FolderOptions, read_folder),
    "table": Reader(TableOptions, read_table),
}
