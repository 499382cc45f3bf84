"""A YAML file and dotted overrides become one checked ``Config``; unknown names are refused."""

import contextlib
import copy
import difflib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from dist_obdsd.config.ranking import SECTIONS
from dist_obdsd.config.schema import CHANGEABLE_ON_RESUME, Config
from dist_obdsd.config.yaml_file import mistake, read_mapping
from dist_obdsd.errors import InputError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``a.b=c`` overrides (values are YAML) and check everything.

    Raises:
        InputError: with one sentence per mistake.
    """
    example = "a mapping of settings; see configs/ for examples"
    raw = read_mapping(Path(path), "config", "give the path of a YAML file", example)
    return parse_config(override_config(raw, overrides), str(path))


def override_config(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Copy nested settings and put ``a.b=c`` overrides in."""
    raw = copy.deepcopy(raw)
    for override in overrides:
        _apply(raw, override)
    return raw


def parse_config(raw: dict[str, Any], origin: str) -> Config:
    """Check a nested dictionary. ``origin`` names it in the error."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise InputError(f"{origin}: " + "; ".join(_sentences(error))) from error


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"override {override!r} is not of the form key=value, such as optim.lr=0.001")
    try:
        # YAML 1.1 reads 1e-3 as text; a bare number in exponent form means the number here.
        value = yaml.safe_load(text)
        if isinstance(value, str):
            value = float(value) if _is_number(value) else value
    except yaml.YAMLError as error:
        raise InputError(f"override {override!r}: the value is not valid YAML") from error
    *parents, leaf = key.split(".")
    node = raw
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise InputError(f"override {override!r}: {parent} is a single value, not a section")
        node = child
    node[leaf] = value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return any(c.isdigit() for c in text)


def _sentences(error: ValidationError) -> Iterable[str]:
    for item in error.errors():
        # Between "ranking" and the field stands the tag of the section that was chosen, which no user wrote.
        parts = [str(part) for i, part in enumerate(item["loc"]) if not (i == 1 and part in SECTIONS)]
        where = ".".join(parts)
        if item["type"] == "extra_forbidden":
            loss = SECTIONS.get(str(item["loc"][1])) if parts[0] == "ranking" else None
            if loss is not None:
                has = ", ".join(loss.model_fields)
                yield f"unknown setting {where}; the loss {item['loc'][1]} has {has}"
            else:
                near = difflib.get_close_matches(where, setting_names(), n=1, cutoff=0.0)
                yield f"unknown setting {where}; did you mean {near[0]}?"
        elif item["type"] == "ranking_name":
            yield item["msg"]
        else:
            yield mistake(where, item)


def setting_names(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """List every dotted setting name, sections included."""
    names = []
    for name, field in section.model_fields.items():
        names.append(prefix + name)
        for inner in _sections(field.annotation):
            names += setting_names(inner, f"{prefix}{name}.")
    return list(dict.fromkeys(names))


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """Find the sections that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections(inner)


def changed_settings(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """List what differs between two dumped configs and must not, as ``name: old -> new``.

    CHANGEABLE_ON_RESUME holds what may differ. A setting that the old version did not know has its default there.
    """
    changes = []
    if not prefix:
        with contextlib.suppress(ValueError):
            old = Config.model_validate(old).model_dump(mode="json")
    for key in sorted(old.keys() | new.keys()):
        name = prefix + key
        if name in CHANGEABLE_ON_RESUME:
            continue
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            changes += changed_settings(a, b, f"{name}.")
        elif a != b:
            changes.append(f"{name}: {a} -> {b}")
    return changes
