"""Readers: from a download to (image, class, split, role), ordered by names.

There is one for every kind of layout. Two data sets of one kind differ in options, which recipes hold.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from dist_obdsd.data.images import IMAGE_SUFFIXES, may_be_image, open_image
from dist_obdsd.data.packing.sources import File, Tree
from dist_obdsd.errors import InputError
from dist_obdsd.rng import rng

logger = logging.getLogger(__name__)

OnMissing = Callable[[str], None]
"""Called with a clause that says what the source lacks. It raises an error, or returns so that the reader goes on.

The clause goes into the manifest, so it names no folder of this machine.
"""

Names = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]
"""Alternatives: the first that is there counts. One of them may stand without brackets."""


@dataclass(frozen=True)
class Sample:
    """One image of a source."""

    name: str
    """Path within the source, with forward slashes; unique."""
    class_name: str
    split: str
    """train or test."""
    role: str
    """See ``manifest``."""
    read: Callable[[], bytes]
    """Returns the encoded image."""


class Reader(BaseModel):
    """One layout of data sets; its fields are the options that a recipe sets."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def draw(self) -> list[Sample]:
        """Draw all samples, in any order, where no source is needed."""
        raise NotImplementedError


class FileReader(Reader):
    """A reader of a download."""

    archives: Names = ()
    """Archives (zip; tar, also compressed) that are read as if extracted where they lie: in the source, one folder
    below it, or in a subfolder given here. An archive whose extracted folder lies beside it is not read."""
    test_fraction: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the classes that goes to the test split where nothing else says which."""
    split_seed: Annotated[int, Field(ge=0)] = 0
    """Seed of that choice."""

    def read(self, tree: Tree, on_missing: OnMissing) -> list[Sample]:
        """List all samples, in any order."""
        raise NotImplementedError

    def test_classes(self, classes: Iterable[str]) -> set[str]:
        """Choose the classes of the test split by ``test_fraction`` and ``split_seed``."""
        names = sorted(set(classes))
        held_out = round(self.test_fraction * len(names))
        order = rng(self.split_seed, "folder split").permutation(len(names)).tolist()
        return {names[i] for i in order[:held_out]}


def raise_missing(clause: str) -> None:
    """Refuse an incomplete source."""
    raise InputError(f"{clause}; complete the data, or pass --allow-partial to pack what is there")


def list_samples(
    reader: Reader, source: Path | None, scratch: Path, on_missing: OnMissing = raise_missing
) -> list[Sample]:
    """List the samples of a source, training first.

    Args:
        source: the download: its folder or an archive; None for a reader that draws its images.
        scratch: the folder that archives are extracted into; it is needed while samples are read.
        on_missing: called with what the source should hold and does not.

    Raises:
        InputError: the source is missing, superfluous, unreadable or not laid out as the reader needs.
        OSError: there is no room to extract an archive.
    """
    if isinstance(reader, FileReader):
        if source is None:
            raise InputError("this recipe reads a download; give its folder or archive with --source")
        samples = reader.read(Tree(source, reader.archives, scratch), on_missing)
    else:
        if source is not None:
            raise InputError(f"this recipe draws its images and cannot use {source}; leave --source out")
        samples = reader.draw()
    return sorted(samples, key=lambda s: (s.split != "train", s.split, s.class_name, s.name))


def default_role(split: str) -> str:
    return "train" if split == "train" else "both"


def images_among(files: Iterable[File], log: bool = True) -> list[File]:
    """Choose the images, by suffix or else by content; log how many others there are."""
    images, others = [], Counter[str]()
    for file in files:
        if file.name.lower().endswith(IMAGE_SUFFIXES) or _holds_image(file):
            images.append(file)
        else:
            others[PurePosixPath(file.name).suffix or "without a suffix"] += 1
    if others and log:
        named = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(9))
        logger.info("left out %d files that hold no image: %s", others.total(), named)
    return images


def _holds_image(file: File) -> bool:
    try:
        if not may_be_image(file.read(16)):
            return False
        open_image(file.read())
    except Exception:  # Pillow raises nearly every built-in type
        return False
    return True
