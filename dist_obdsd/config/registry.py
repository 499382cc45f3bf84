"""The named parts that a config chooses between, and the file that each is written in.

To add a ranking loss, a target, a metric, a backbone, a reader or a strategy: write one file, and add its line here.
Validation, ``--help``, the builders and the tables in the docs read these lists. A part is imported when it is first
used, so that reading the names costs nothing.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dist_obdsd.errors import InputError


@dataclass(frozen=True)
class Registry:
    """One kind of part."""

    kind: str
    """Its name in messages, such as ``ranking loss``."""
    setting: str
    """The setting that chooses one, such as ``ranking.name``."""
    paths: Mapping[str, str]
    """Name -> ``module:attribute``."""

    @property
    def names(self) -> list[str]:
        return list(self.paths)

    def check(self, name: str) -> str:
        """Return ``name`` if it is registered; for pydantic's validators.

        Raises:
            ValueError: it is not; the message lists the names that are.
        """
        if name not in self.paths:
            raise ValueError(f"{self.setting} is {name!r}; set it to one of {', '.join(self.paths)}")
        return name

    def load(self, name: str) -> Any:
        """Import the part called ``name``.

        Raises:
            InputError: there is none of that name.
        """
        try:
            module, _, attribute = self.paths[self.check(name)].partition(":")
        except ValueError as error:
            raise InputError(str(error)) from error
        return getattr(importlib.import_module(module), attribute)


STRATEGIES = Registry(
    "strategy",
    "strategy",
    {
        "ddp": "dist_obdsd.training.ddp:DDPStrategy",
        "deepspeed": "dist_obdsd.training.deepspeed:DeepSpeedStrategy",
    },
)

READERS = Registry(
    "reader",
    "reader",
    {
        "glyphs": "dist_obdsd.data.packing.readers.glyphs:GlyphsReader",
        "folder": "dist_obdsd.data.packing.readers.folder:FolderReader",
        "table": "dist_obdsd.data.packing.readers.table:TableReader",
    },
)
