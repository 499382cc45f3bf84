"""Loading of a checked ``Config`` from a YAML file and dotted overrides."""

import contextlib
import copy
import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from dist_obdsd.config.base import flatten
from dist_obdsd.config.ranking import SECTIONS
from dist_obdsd.config.schema import CHANGEABLE_ON_RESUME, Config
from dist_obdsd.config.yaml_file import PLAIN, mistake, parse_value, read_mapping
from dist_obdsd.errors import InputError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and put overrides in; InputError has a sentence per mistake."""
    example = "a mapping of settings; see configs/ for examples"
    raw = read_mapping(Path(path), "config", "give the path of a YAML file", example)
    return parse_config(override_config(raw, overrides), str(path))


def override_config(raw: dict[str, Any], overrides: Sequence[str], section: type[BaseModel] = Config) -> dict[str, Any]:
    """Copy nested settings and put ``a.b=c`` overrides in.

    A setting of ``section`` that holds text takes the value as typed. Others take null, true, false, a number, a
    [list] or a {mapping}, else text.

    Raises:
        InputError: an override is malformed.
    """
    raw, types = copy.deepcopy(raw), setting_types(section)
    for override in overrides:
        key, equals, text = override.partition("=")
        *parents, leaf = key.split(".")
        if not equals or not all([*parents, leaf]):
            raise InputError(f"override {override!r} is not of the form key=value, such as optim.lr=0.001")
        node = raw
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise InputError(f"override {override!r}: {parent} is a single value, not a section")
        above = types.get(".".join(parents))
        kind = get_args(above)[1] if get_origin(above) is dict else types.get(key)
        unset = NoneType in get_args(kind) and re.fullmatch(PLAIN["null"], text)
        try:
            node[leaf] = text if _is_text(kind) and not unset else parse_value(text)
        except ValueError as error:
            raise InputError(f"override {override!r} is not valid YAML: {error}") from error
    return raw


def parse_config(raw: dict[str, Any], origin: str) -> Config:
    """Check a nested dictionary. ``origin`` names it in the error."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise InputError(f"{origin}: " + "; ".join(_sentences(error))) from error


def _is_text(annotation: Any) -> bool:
    """Tell if a setting holds text, perhaps one of several choices, or null."""
    if get_origin(annotation) is Annotated:
        return _is_text(get_args(annotation)[0])
    if get_origin(annotation) in (Literal, Union, UnionType):
        return all(_is_text(part) for part in get_args(annotation) if part is not NoneType)
    return annotation is str or isinstance(annotation, str)  # a text in a Literal


def _sentences(error: ValidationError) -> Iterable[str]:
    wrong = [item["loc"] for item in error.errors()]
    for item in error.errors():
        if any(len(loc) > len(item["loc"]) and loc[: len(item["loc"])] == item["loc"] for loc in wrong):
            continue  # a list is also too short without what is wrong in it
        first, *rest = [str(part) for part in item["loc"]] or [""]
        # Between "ranking" and the field stands the tag of the section that was chosen, which no user wrote.
        loss = rest.pop(0) if first == "ranking" and rest and rest[0] in SECTIONS else None
        where = ".".join([first, *rest])
        if item["type"] == "extra_forbidden" and loss is not None:
            yield f"unknown setting {where}; the loss {loss} has {', '.join(SECTIONS[loss].model_fields)}"
        elif item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(where, setting_types(), n=1, cutoff=0.0)
            yield f"unknown setting {where}; did you mean {near[0]}?"
        elif item["type"] == "ranking_name":
            yield item["msg"]
        else:
            yield mistake(where, item)


def setting_types(section: type[BaseModel] = Config, prefix: str = "") -> dict[str, Any]:
    """Map every dotted setting, sections included, to its type."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        found.setdefault(prefix + name, field.annotation)
        for inner in _sections(field.annotation):
            found = setting_types(inner, f"{prefix}{name}.") | found
    return found


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections(inner)


def changed_settings(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """List what must not differ between two dumped configs, as ``name: old -> new``.

    A setting that the old version did not know has its default there.
    """
    with contextlib.suppress(ValueError):
        old = Config.model_validate(old).model_dump(mode="json")
    before, after = flatten(old), flatten(new)
    return [
        f"{name}: {before.get(name)} -> {after.get(name)}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and not {name, name.partition(".")[0]} & CHANGEABLE_ON_RESUME
    ]
