"""Lists of images: tables with each image's path, class, split and role."""

import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from dist_obdsd.data.manifest import ROLES, asks, gallery_of
from dist_obdsd.data.packing.readers.base import FileReader, Names, OnMissing, Sample, default_role
from dist_obdsd.data.packing.readers.rows import Row, Rows, matlab_rows, matlab_texts, text_rows
from dist_obdsd.data.packing.sources import File, Tree, inside
from dist_obdsd.errors import InputError


class ListFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    file: Names
    """The list: a text table, or a MATLAB file where its name ends in ``.mat``. Looked for at the top of the source and
    in every folder there."""
    images: Names = ("",)
    """The folder that the listed paths begin in."""
    split: Literal["train", "test"] | None = None
    """The split of all images in this list."""
    layout: str = ""
    """Lists with the same one belong together. The first layout of which the source has a list is read."""


class TableReader(FileReader):
    lists: Annotated[tuple[ListFile, ...], Field(min_length=1)]
    delimiter: Annotated[str, Field(max_length=1)] = ""
    """Between two cells; empty: white space."""
    skip: Annotated[int, Field(ge=0)] = 0
    """Lines before the table."""
    columns: tuple[str, ...] = ()
    """Names of the columns in their order; unset: the table's first line holds them."""
    variable: str = "annotations"
    """The struct array of a MATLAB file whose fields are the columns."""
    path_column: Names = ("path",)
    class_column: Names = ("class",)
    """Unset ([]): an image's class is the folder that its path names."""
    split_column: str = "split"
    """Holds ``train`` or ``test``."""
    role_column: str = "role"
    """Holds ``train``, ``both``, ``query``, ``gallery`` or ``gallery:NAME``; unset or empty: by the split."""
    class_names: Names = ()
    """A MATLAB file whose ``class_names`` gives the classes, numbered from 1, names to be read by."""
    last_train_class: Annotated[int, Field(ge=1)] | None = None
    """Where nothing says the split: classes whose number is at most this are for training, the others for testing. A
    class's number is the digits that it begins with."""

    def read(self, tree: Tree, on_missing: OnMissing) -> list[Sample]:
        reading = _Reading(tree, self)
        for listing, base, file in _lists(tree, self, on_missing):
            if missing := reading.add(listing, base, file):
                others = f" (and {len(missing) - 1} other images of this list)" if len(missing) > 1 else ""
                on_missing(missing[0] + others)
        return reading.samples()


@dataclass
class _Image:
    where: str
    class_name: str
    split: str | None
    role: str | None
    file: File


def _lists(tree: Tree, reader: TableReader, on_missing: OnMissing) -> list[tuple[ListFile, str, File]]:
    """Find the lists of one layout, and the folder that each was found from."""
    if tree.given is not None:
        if len(reader.lists) > 1:
            raise InputError(f"the source {tree.source} is one file but the recipe reads several; give their folder")
        file = tree.find(tree.given)
        assert file is not None  # it was there when the tree was made
        return [(reader.lists[0], "", file)]
    for layout in dict.fromkeys(listing.layout for listing in reader.lists):
        wanted = [listing for listing in reader.lists if listing.layout == layout]
        there = [(listing, _find(tree, listing.file)) for listing in wanted]
        if any(found for _, found in there):
            for listing, found in there:
                if found is None:
                    on_missing(f"the source holds no {' or '.join(listing.file)}")
            return [(listing, *found) for listing, found in there if found is not None]
    first = {listing.layout: listing.file[0] for listing in reversed(reader.lists)}
    packed = f" (nor {', '.join(reader.archives)})" if reader.archives else ""
    itself = ", or the list itself" if len(reader.lists) == 1 else ""
    raise InputError(
        f"{tree.source} holds no {' or '.join(reversed(first.values()))}{packed}, at the top or in a folder there; "
        f"give the folder or the archive with the download{itself}"
    )


def _find(tree: Tree, names: Sequence[str]) -> tuple[str, File] | None:
    """Find the first of some files that is there, and the folder it was found from."""
    for base in tree.bases:
        for name in names:
            if (file := tree.find(base + name)) is not None:
                return base, file
    return None


class _Reading:
    """The images of the lists read so far, by the names that the samples will have."""

    def __init__(self, tree: Tree, reader: TableReader) -> None:
        self.tree, self.reader = tree, reader
        self.images: dict[str, _Image] = {}
        found = _find(tree, reader.class_names)
        self.names = matlab_texts(found[1], "class_names") if found else []

    def add(self, listing: ListFile, base: str, file: File) -> list[str]:
        """Read one list.

        Returns:
            A clause for each listed image that the source lacks.

        Raises:
            InputError: a row cannot be used; it is named.
        """
        reader, missing = self.reader, []
        if file.name.lower().endswith(".mat"):
            rows = matlab_rows(file, reader.variable)
        else:
            rows = text_rows(file, reader.delimiter, reader.skip, reader.columns)
        path_column = _column(file, rows, reader.path_column, "path")
        class_column = _column(file, rows, reader.class_column, "class") if reader.class_column else None
        split_column = _optional(file, rows, reader, "split_column")
        role_column = _optional(file, rows, reader, "role_column")
        places = [start + images for start in dict.fromkeys((base, *self.tree.bases)) for images in listing.images]
        for row in rows.rows:
            path = _cell(row, path_column)
            inner = inside(path)
            if inner is None:
                raise InputError(
                    f"{row.where}: the path {path!r} may point outside; write it relative to the source and with "
                    f"forward slashes"
                )
            class_name = _cell(row, class_column) if class_column else posixpath.dirname(inner)
            if not class_name:
                raise InputError(f"{row.where}: the path {path!r} names no folder, which is to be the image's class")
            split, role = _split_and_role(row, listing.split, split_column, role_column)
            if split is None and reader.last_train_class is not None:
                split = "train" if _number(row, class_name) <= reader.last_train_class else "test"
            class_name = self._class_name(row, class_name)
            found = next((found for place in places if (found := self.tree.find(posixpath.join(place, inner)))), None)
            if found is None:
                missing.append(f"{file.name}{row.place}: the image {path} is not there")
                continue
            name = posixpath.join(listing.images[0], inner)
            image = _Image(row.where, class_name, split, role, found)
            self.images[name] = _merged(self.images[name], image, path) if name in self.images else image
        return missing

    def _class_name(self, row: Row, class_name: str) -> str:
        if not self.names:
            return class_name
        number = _number(row, class_name)
        if not 1 <= number <= len(self.names):
            raise InputError(f"{row.where}: class {number} has no name; there are names for 1 to {len(self.names)}")
        return self.names[number - 1]

    def samples(self) -> list[Sample]:
        open_ones = (image.class_name for image in self.images.values() if image.split is None)
        held_out = self.reader.test_classes(open_ones)
        samples = []
        for name, image in self.images.items():
            split = image.split or ("test" if image.class_name in held_out else "train")
            samples.append(Sample(name, image.class_name, split, image.role or default_role(split), image.file.read))
        return samples


def _column(file: File, rows: Rows, alternatives: Sequence[str], what: str) -> str:
    for name in alternatives:
        if name in rows.columns:
            return name
    raise InputError(
        f"{file.where} has no column {' or '.join(alternatives)} but {', '.join(rows.columns)}; name the {what}'s "
        f"column with options.{what}_column=NAME"
    )


def _optional(file: File, rows: Rows, reader: TableReader, option: str) -> str | None:
    """Find a column that may be missing unless the recipe names it."""
    name = getattr(reader, option)
    if name in rows.columns:
        return name
    if option in reader.model_fields_set:
        raise InputError(f"{file.where} has no column {name} ({option}) but {', '.join(rows.columns)}")
    return None


def _cell(row: Row, column: str) -> str:
    if not row.cells[column]:
        raise InputError(f"{row.where}: {column} is empty or no text; mend it")
    return row.cells[column]


def _split_and_role(
    row: Row, split: str | None, split_column: str | None, role_column: str | None
) -> tuple[str | None, str | None]:
    """Read a row's split and role; None for what it leaves open."""
    if split_column:
        split = _cell(row, split_column)
        if split not in ("train", "test"):
            raise InputError(f"{row.where}: {split_column} is {split!r}; it must be train or test")
    role = row.cells[role_column] if role_column else ""
    if not role:
        if role_column and split is None:
            raise InputError(f"{row.where}: {role_column} is empty and nothing else says the split; fill it in")
        return split, None
    if not asks(role) and gallery_of(role) is None:
        raise InputError(f"{row.where}: {role_column} is {role!r}; it must be {', '.join(ROLES)} or gallery:NAME")
    implied = "train" if role == "train" else "test"
    if split is not None and split != implied:
        raise InputError(f"{row.where}: {role_column} is {role!r} but the split is {split}; make them agree")
    return implied, role


def _number(row: Row, class_name: str) -> int:
    digits = re.match(r"\d+", class_name)
    if digits is None:
        raise InputError(f"{row.where}: the class {class_name!r} does not begin with a number")
    return int(digits[0])


def _merged(old: _Image, new: _Image, path: str) -> _Image:
    """Join two entries of an image: only a query may be in the gallery, too."""
    if old.class_name == new.class_name and {old.role, new.role} == {"query", "gallery"}:
        return _Image(old.where, old.class_name, old.split, "both", old.file)
    raise InputError(f"{new.where}: lists {path} again, after {old.where}; an image has one class and one split")
