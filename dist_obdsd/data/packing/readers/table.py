"""Lists of images: tables with each image's path, class, split and role."""

import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from dist_obdsd.data.manifest import ROLES, asks, gallery_of
from dist_obdsd.data.packing.readers.base import FileReader, Names, OnMissing, Sample, default_role
from dist_obdsd.data.packing.readers.rows import Row, matlab_rows, matlab_variable, text_rows
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
        found = _find(tree, self.class_names)
        names = [str(name) for name in matlab_variable(found[1], "class_names")] if found else []
        images: dict[str, _Image] = {}
        files: dict[str, File] = {}
        for listing, base, file in _lists(tree, self, on_missing):
            places = [start + images for start in dict.fromkeys((base, *tree.bases)) for images in listing.images]
            missing = []
            for image in self._listed(listing, file, names):
                there = (tree.find(posixpath.join(place, image.path)) for place in places)
                if (image_file := next(filter(None, there), None)) is None:
                    missing.append(f"{file.name}{image.row.place}: the image {image.path} is not there")
                    continue
                name = posixpath.join(listing.images[0], image.path)
                images[name] = _merged(images[name], image) if name in images else image
                files[name] = image_file
            if missing:
                others = f" (and {len(missing) - 1} other images of this list)" if len(missing) > 1 else ""
                on_missing(missing[0] + others)
        held_out = self.test_classes(image.class_name for image in images.values() if image.split is None)
        samples = []
        for name, image in images.items():
            split = image.split or ("test" if image.class_name in held_out else "train")
            samples.append(Sample(name, image.class_name, split, image.role or default_role(split), files[name].read))
        return samples

    def _listed(self, listing: ListFile, file: File, names: Sequence[str]) -> Iterator["_Image"]:
        """Read the rows of one list, or raise InputError with its name."""
        if file.name.lower().endswith(".mat"):
            columns, rows = matlab_rows(file, self.variable)
        else:
            columns, rows = text_rows(file, self.delimiter, self.skip, self.columns)
        path_column = _column(file, columns, self.path_column, "path")
        class_column = _column(file, columns, self.class_column, "class") if self.class_column else None
        split_column = self._optional(file, columns, "split_column")
        role_column = self._optional(file, columns, "role_column")
        for row in rows:
            given = _cell(row, path_column)
            if (path := inside(given)) is None:
                raise InputError(
                    f"{row.where}: the path {given!r} may point outside; write it relative to the source and with "
                    f"forward slashes"
                )
            class_name = _cell(row, class_column) if class_column else posixpath.dirname(path)
            if not class_name:
                raise InputError(f"{row.where}: the path {path!r} names no folder, which is to be the image's class")
            split, role = _split_and_role(row, listing.split, split_column, role_column)
            if split is None and self.last_train_class is not None:
                split = "train" if _number(row, class_name) <= self.last_train_class else "test"
            if names:
                number = _number(row, class_name)
                if not 1 <= number <= len(names):
                    raise InputError(f"{row.where}: class {number} has no name; there are names for 1 to {len(names)}")
                class_name = names[number - 1]
            yield _Image(row, path, class_name, split, role)

    def _optional(self, file: File, columns: Sequence[str], option: str) -> str | None:
        """Find a column that may be missing unless the recipe names it."""
        name: str = getattr(self, option)
        if name in columns:
            return name
        if option in self.model_fields_set:
            raise InputError(f"{file.where} has no column {name} ({option}) but {', '.join(columns)}")
        return None


@dataclass(frozen=True)
class _Image:
    row: Row
    path: str
    class_name: str
    split: str | None
    role: str | None


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


def _column(file: File, columns: Sequence[str], alternatives: Sequence[str], what: str) -> str:
    for name in alternatives:
        if name in columns:
            return name
    raise InputError(
        f"{file.where} has no column {' or '.join(alternatives)} but {', '.join(columns)}; name the {what}'s "
        f"column with options.{what}_column=NAME"
    )


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


def _merged(old: _Image, new: _Image) -> _Image:
    """Join two entries of an image: only a query may be in the gallery, too."""
    if old.class_name == new.class_name and {old.role, new.role} == {"query", "gallery"}:
        return replace(old, role="both")
    raise InputError(
        f"{new.row.where}: lists {new.path} again, after {old.row.where}; an image has one class and one split"
    )
