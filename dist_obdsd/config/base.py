"""The base of every section of the configuration."""

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Location = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
"""A path, in which ~ is the home folder, or the address of something remote."""


class Section(BaseModel):
    """A section: frozen, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Map dotted names to the values of nested dictionaries."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def read_names(value: Any) -> Any:
    """Read names from a list, or from the path of a text file with one name per line."""
    if not isinstance(value, str):
        # A class called 12 is a number to YAML.
        listed = isinstance(value, list | tuple)
        return [str(name) if type(name) is int else name for name in value] if listed else value
    try:
        lines = Path(value).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot read {value}: {reason}; give a list of names, or a file with one a line") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise ValueError(f"{value} holds no names; write one per line")
    return names
