"""Readers: from a data set as it is downloaded to (image, class, split, role), in an order fixed by the names.

There is one reader for every kind of layout, listed in ``config.registry.READERS``. Two data sets of one kind differ
in options, which recipes hold.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dist_obdsd.data.packing.readers.base import (
    DrawingReader,
    FileReader,
    OnMissing,
    Reader,
    Sample,
    raise_missing,
)
from dist_obdsd.data.packing.sources import Tree
from dist_obdsd.errors import InputError

__all__ = ["Reader", "Sample", "open_samples", "raise_missing"]


@contextmanager
def open_samples(
    reader: Reader, source: Path | None, on_missing: OnMissing = raise_missing, scratch: Path | None = None
) -> Iterator[list[Sample]]:
    """List the samples of a source, training first; archives stay open meanwhile.

    Args:
        source: the download: its folder or an archive; None for a reader that draws its images.
        on_missing: called with what the source should hold and does not.
        scratch: folder for the temporary file that a compressed tar is unpacked into; None lets the system choose.

    Raises:
        InputError: the source is missing, superfluous or not laid out as the reader needs.
        RunError: there is no room for the temporary file.
    """
    with ExitStack() as stack:
        if isinstance(reader, DrawingReader):
            if source is not None:
                raise InputError(f"this recipe draws its images and cannot use {source}; leave --source out")
            samples = reader.draw()
        else:
            assert isinstance(reader, FileReader)
            if source is None:
                raise InputError("this recipe reads a download; give its folder or archive with --source")
            samples = reader.read(Tree(source, reader.archives, scratch, stack), on_missing)
        yield sorted(samples, key=lambda s: (s.split != "train", s.split, s.class_name, s.name))
