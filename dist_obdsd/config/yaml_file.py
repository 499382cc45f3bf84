"""YAML that people write, in configs, recipes and overrides.

A plain word is text, but for null, true, false and decimal numbers. So a class called 007, a name such as 2024-01-01
and a ``no`` stay what was written. A bare ``1e-3`` is a number.
"""

import re
import reprlib
from pathlib import Path
from typing import Any

import yaml

from dist_obdsd.errors import InputError

PLAIN = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(?:0|[1-9][0-9]*)",
    "float": r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|nan)",
}
"""The words that are no text, as patterns, by YAML's name of their type."""
_short = reprlib.Repr()
_short.maxstring = 160


class _Loader(yaml.SafeLoader):
    """YAML with these plain words, in which no key may come twice."""

    yaml_implicit_resolvers: Any = {}  # noqa: RUF012

    def compose_mapping_node(self, anchor: Any) -> Any:
        mapping = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in mapping.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                raise yaml.YAMLError(f"{name} stands in line {lines[name]} and again in line {line}; keep one of them")
            lines[name] = line
        return mapping


class _Dumper(yaml.SafeDumper):
    """Writes what ``_Loader`` reads back as it was."""

    yaml_implicit_resolvers: Any = {}  # noqa: RUF012


for _kind, _pattern in PLAIN.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_pattern})$"), None)
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile("<<$"), ["<"])


def parse_yaml(text: str) -> Any:
    """Read one YAML document.

    Raises:
        ValueError: it is not valid; the message is one line.
    """
    try:
        return yaml.load(text, _Loader)  # a safe loader
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def to_yaml(value: Any) -> str:
    """Write plain data so that ``parse_yaml`` gives it back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


def parse_value(text: str) -> Any:
    """Read null, a boolean, number, [list] or {mapping}, else the text as typed.

    Raises:
        ValueError: a list or mapping is not valid YAML.
    """
    bare = text.strip()
    plain = any(re.fullmatch(pattern, bare) for pattern in PLAIN.values())
    return parse_yaml(bare) if plain or bare.startswith(("[", "{")) else text


def read_mapping(path: Path, what: str, advice: str, example: str) -> dict[str, Any]:
    """Read a YAML mapping.

    Args:
        what: the user's word for the file, such as ``config``.
        advice: what to give instead of a file that cannot be read.
        example: what the file should hold, and where one can be seen.

    Raises:
        InputError: it cannot be read, is not YAML, holds a key twice or holds something else.
    """
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the {what} {path}: {error.strerror}; {advice}") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        found = "nothing" if raw is None else f"a {type(raw).__name__}"
        raise InputError(f"{path} holds {found}, not {example}")
    return raw


def mistake(where: str, item: Any) -> str:
    """Turn one of pydantic's complaints, about the entry ``where``, into a sentence."""
    if item["type"] == "missing":
        return f"{where} is missing; add it"
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    if item["type"] == "too_short":
        return f"{where} is empty; give at least {item['ctx']['min_length']}"
    hint = ""
    if item["type"] == "string_type" and isinstance(item["input"], int | float):
        hint = f', so write it in quotes: "{item["input"]}"'
    return f"{where} is {_short.repr(item['input'])}: {item['msg'][0].lower()}{item['msg'][1:]}{hint}"
