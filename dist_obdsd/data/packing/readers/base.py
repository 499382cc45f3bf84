"""What every reader works with: samples, options, and how classes are split where the source does not say."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from dist_obdsd.errors import InputError
from dist_obdsd.rng import rng

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

Lack = Callable[[str], None]
"""Called with a clause that says what the source lacks. It raises, or takes note so that the reader goes on without.
The clause goes into the manifest, so it names no place on this machine."""

Names = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]
"""Alternatives, the first of which that is there counts; one of them may stand without brackets."""


@dataclass(frozen=True)
class Sample:
    """One image of a source."""

    name: str
    """Path within the source, with forward slashes; unique."""
    class_name: str
    split: str
    """train or test."""
    role: str
    """train, both, query, gallery or gallery:NAME."""
    read: Callable[[], bytes]
    """The encoded image."""


class Options(BaseModel):
    """A reader's own settings in a recipe; closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FileOptions(Options):
    """Of a reader that reads files."""

    archives: Names = ()
    """Archives (zip; tar, also compressed) that are read as if extracted where they lie: in the source, one folder
    below it, or in a subfolder given here. One that was extracted there, so that its folder is there too, is not."""
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of the classes that goes to the test split where nothing else says which."""
    split_seed: Annotated[int, Field(ge=0)] = 0
    """Of that choice."""


def refuse(clause: str) -> None:
    """The strict ``Lack``."""
    raise InputError(f"{clause}; complete the data, or pass --allow-partial to pack what is there")


def default_role(split: str) -> str:
    return "train" if split == "train" else "both"


def is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def test_classes(classes: Iterable[str], options: FileOptions) -> set[str]:
    """The classes that ``test_fraction`` and ``split_seed`` take for the test split."""
    names = sorted(set(classes))
    held_out = round(options.test_fraction * len(names))
    order = rng(options.split_seed, "folder split").permutation(len(names)).tolist()
    return {names[i] for i in order[:held_out]}
