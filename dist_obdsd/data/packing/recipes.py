"""Recipes: YAML that turns a download into (image, class, split, role)."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from dist_obdsd.config import override_config
from dist_obdsd.config.registry import READERS
from dist_obdsd.config.yaml_file import mistake, read_mapping
from dist_obdsd.data.packing.readers.base import Reader
from dist_obdsd.errors import InputError

Whole = Annotated[int, Field(ge=0)]


class Count(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    images: Whole
    classes: Whole


class Counts(Count):
    roles: dict[str, Count] = {}
    """Counts by role, where the split has queries and a gallery."""


class Recipe(BaseModel):
    """A data set's reader and its options; closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    reader: str
    """A name in ``config.registry.READERS``."""
    description: str
    download: str = ""
    """Where the data comes from and under which licence, for a person to follow."""
    options: dict[str, Any] = {}
    expected: dict[str, Counts] = {}
    """Images and classes per split, and per role in it; packing refuses a source that differs."""

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        try:
            self.make_reader()
        except ValidationError as error:
            raise ValueError("; ".join(_sentence(item, "options.") for item in error.errors())) from error
        return self

    def make_reader(self) -> Reader:
        """Make the reader, which checks the options and fills in its defaults."""
        reader: Reader = READERS.load(READERS.check(self.reader)).model_validate(self.options)
        return reader


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by name or path, and apply ``options.NAME=value`` overrides.

    Raises:
        InputError: there is no such recipe, or it holds a mistake.
    """
    text = str(name_or_path)
    if "/" in text or text.endswith((".yaml", ".yml")):
        path = Path(text)
    else:
        names = recipe_names()
        if text not in names:
            near = difflib.get_close_matches(text, names, n=1, cutoff=0.0)[0]
            raise InputError(
                f"there is no recipe {text!r}; did you mean {near}? recipes are {', '.join(names)}, or give the path "
                f"of a YAML file"
            )
        path = recipe_folder() / f"{text}.yaml"
    example = "a mapping; see shards/folder.yaml for an example"
    raw = read_mapping(path, "recipe", "give a recipe's name or path", example)
    kind = Recipe
    if (reader := raw.get("reader")) in READERS.choices:  # whose options have types
        kind = create_model("Recipe", __base__=Recipe, options=(READERS.load(reader), ...))
    raw = override_config(raw, overrides, kind)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise InputError(f"{path}: " + "; ".join(_sentence(item) for item in error.errors())) from error


def recipe_folder() -> Path:
    """Return ``shards/`` of the checkout in use, else the installed copy."""
    package = Path(__file__).resolve().parents[2]
    checkout = package.parent / "shards"
    # The project file tells a checkout from a site-packages folder, in which any other package may have put shards/.
    if checkout.is_dir() and (package.parent / "pyproject.toml").is_file():
        return checkout
    return package / "_resources" / "shards"


def recipe_names() -> list[str]:
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


def _sentence(item: Any, prefix: str = "") -> str:
    where = prefix + ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"unknown key {where}; remove it or check its spelling"
    return mistake(where, item)
