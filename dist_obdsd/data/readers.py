"""Readers: from a data set as it is downloaded to (image, class, split, role), in an order fixed by the names.

A reader lists its samples first and reads an image's bytes only when asked, so that a large set is never in memory.
"""

import os
import posixpath
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from dist_obdsd.errors import InputError
from dist_obdsd.seeds import rng

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Sample:
    """One image of a source."""

    name: str
    """Path within the source, with forward slashes; unique."""
    class_name: str
    split: str
    """train or test."""
    role: str
    """train, both, query or gallery."""
    read: Callable[[], bytes]
    """The encoded image."""


class Options(BaseModel):
    """A reader's own settings in a recipe; closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class NoOptions(Options):
    pass


class FolderOptions(Options):
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of the classes that goes to the test split where the source has no train/ and test/."""
    split_seed: Annotated[int, Field(ge=0)] = 0
    """Of that choice."""


class GlyphsOptions(Options):
    variants: Annotated[int, Field(ge=1, le=16)] = 2
    """Images of a letter in a face, at different sizes and places."""
    draw_seed: Annotated[int, Field(ge=0)] = 0
    """Of the sizes and places."""


@contextmanager
def open_samples(reader: str, options: Options, source: Path | None) -> Iterator[list[Sample]]:
    """The samples of a source, training before test, each split by class and name. Archives stay open meanwhile.

    Args:
        reader: a name in READERS.
        options: checked by READERS[reader].
        source: folder of the download; None for a reader that draws its images itself.

    Raises:
        InputError: the source is missing, superfluous or not laid out as the reader needs.
    """
    if source is None and reader != "glyphs":
        raise InputError(f"the reader {reader} needs the downloaded data; give its folder with --source")
    if source is not None and reader == "glyphs":
        raise InputError(f"the reader glyphs draws its images itself and cannot use {source}; leave --source out")
    if source is not None and not source.is_dir():
        raise InputError(f"the source {source} is not a folder; give the folder that holds the download")
    with ExitStack() as stack:
        samples = READERS[reader].read(source, options, stack)
        yield sorted(samples, key=lambda s: (s.split != "train", s.split, s.class_name, s.name))


def _test_role(split: str) -> str:
    return "train" if split == "train" else "both"


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _read_glyphs(source: Any, options: Any, stack: ExitStack) -> list[Sample]:
    from dist_obdsd.data.glyphs import draw_glyphs

    return [
        Sample(name, class_name, split, _test_role(split), partial(bytes, png))
        for name, class_name, split, png in draw_glyphs(options.draw_seed, options.variants)
    ]


def _read_omniglot(source: Path, options: Any, stack: ExitStack) -> list[Sample]:
    """Official split: images_background to train on, images_evaluation to test on; a class is alphabet/character."""
    samples = []
    for split, part in (("train", "images_background"), ("test", "images_evaluation")):
        for name, read in _files(source, part, stack):
            parts = name.split("/")
            if not _is_image(name):
                continue
            if len(parts) != 4:
                raise InputError(
                    f"{source} holds the image {name}, which is not {part}/ALPHABET/CHARACTER/IMAGE; "
                    f"give the folder with the official zips, or with them extracted"
                )
            samples.append(Sample(name, f"{parts[1]}/{parts[2]}", split, _test_role(split), read))
    return samples


def _files(source: Path, part: str, stack: ExitStack) -> list[tuple[str, Callable[[], bytes]]]:
    """The files of ``source/part/`` or of ``source/part.zip``, with names that begin with ``part/``."""
    folder, archive = source / part, source / f"{part}.zip"
    if folder.is_dir():
        paths = (Path(root) / file for root, _, files in os.walk(folder) for file in files)
        return [(path.relative_to(source).as_posix(), path.read_bytes) for path in paths if not _hidden(path, folder)]
    if not archive.is_file():
        raise InputError(f"{source} holds neither {part}.zip nor the folder {part}; download it there (see the recipe)")
    try:
        opened = stack.enter_context(zipfile.ZipFile(archive))
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f"cannot open {archive}: {error}; download it again") from error
    found: list[tuple[str, Callable[[], bytes]]] = []
    for info in opened.infolist():
        name = info.filename
        # A zip entry is only read, never extracted; such a path still tells of an archive that was tampered with.
        if posixpath.isabs(name) or ".." in name.split("/") or "\\" in name or ":" in name.split("/")[0]:
            raise InputError(f"{archive} holds {name!r}, a path that points outside of it; download the archive again")
        if not info.is_dir() and not any(p.startswith((".", "__MACOSX")) for p in name.split("/")):
            found.append((name, partial(opened.read, info)))
    return found


def _hidden(path: Path, above: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(above).parts)


def _read_folder(source: Path, options: Any, stack: ExitStack) -> list[Sample]:
    """One folder per class; under train/ and test/ where the source has these two, else split by class at random."""
    folders = {path.name for path in _folders(source)}
    if {"train", "test"} <= folders:
        if len(folders) > 2:
            extra = min(folders - {"train", "test"})
            raise InputError(
                f"{source} holds train/, test/ and also {extra}/; leave only train/ and test/, "
                f"or only class folders, so that it is clear what is a split and what a class"
            )
        _refuse_loose_images(source)
        found = []
        for split in ("train", "test"):
            _refuse_loose_images(source / split)
            found += [(split, folder) for folder in _folders(source / split)]
    else:
        _refuse_loose_images(source)
        classes = _folders(source)
        held_out = round(options.test_fraction * len(classes))
        order = rng(options.split_seed, "folder split").permutation(len(classes)).tolist()
        test = set(order[:held_out])
        found = [("test" if i in test else "train", folder) for i, folder in enumerate(classes)]
    return [
        Sample(path.relative_to(source).as_posix(), folder.name, split, _test_role(split), path.read_bytes)
        for split, folder in found
        for path in _class_images(folder)
    ]


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise InputError(f"cannot read the folder {folder}: {error.strerror}; check its permissions") from error


def _folders(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if path.is_dir()]


def _loose(folder: Path) -> Sequence[Path]:
    return [path for path in _entries(folder) if _is_image(path.name) and not path.is_dir()]


def _refuse_loose_images(folder: Path) -> None:
    if loose := _loose(folder):
        raise InputError(f"{loose[0]} lies beside the class folders; put every image into the folder of its class")


def _class_images(folder: Path) -> Sequence[Path]:
    for inner in _folders(folder):
        if any(_is_image(file) for _, _, files in os.walk(inner) for file in files):
            raise InputError(
                f"the class folder {folder} has images in its subfolder {inner.name}/; "
                f"a class is one folder, so move them up or make {inner.name} a class of its own"
            )
    return _loose(folder)


@dataclass(frozen=True)
class Reader:
    options: type[Options]
    read: Callable[[Any, Any, ExitStack], list[Sample]]


READERS = {
    "glyphs": Reader(GlyphsOptions, _read_glyphs),
    "omniglot": Reader(NoOptions, _read_omniglot),
    "folder": Reader(FolderOptions, _read_folder),
}
