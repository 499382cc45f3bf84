"""YAML files that people write: read with one sentence per mistake. Configs and recipes share it."""

from pathlib import Path
from typing import Any

import yaml

from dist_obdsd.errors import InputError


def read_mapping(path: Path, what: str, advice: str, example: str) -> dict[str, Any]:
    """Read a YAML mapping.

    Args:
        what: what the file is to the user, such as ``config``.
        advice: what to give instead of a file that cannot be read.
        example: what the file should hold, and where one can be seen.

    Raises:
        InputError: it cannot be read, is not YAML or holds something else.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the {what} {path}: {error.strerror}; {advice}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path} holds {type(raw).__name__}, not {example}")
    return raw


def mistake(where: str, item: Any) -> str:
    """Turn one of pydantic's complaints, about the entry ``where``, into a sentence."""
    if item["type"] == "missing":
        return f"{where} is missing; add it"
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    return f"{where} is {item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}"
