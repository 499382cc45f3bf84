"""The parameters of a target."""

from dataclasses import dataclass, fields
from typing import Any, Self

KEPT_MATRICES = 4
"""n x n matrices that exist at a time where they are kept: S, A, N or its factor, and one being made."""


@dataclass(frozen=True)
class Diffusion:
    """A target by name, and how it is computed. Each field means what the setting ``distillation.FIELD`` means."""

    target: str = "obdsd"
    temperature: float = 1.0
    transition_temperature: float = 1.0
    omega: float = 0.5
    mask_self: bool = False
    neighbours: int | None = None
    mutual: bool = False
    clip: bool = False
    power: float = 1.0
    solver: str = "auto"
    tolerance: float = 1e-4
    memory_gib: float = 2.0

    @classmethod
    def of(cls, settings: Any) -> Self:
        """Take the fields from an object that has attributes of these names, such as the config's section."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})

    def fits(self, nodes: int, bytes_per_entry: int) -> bool:
        """Tell whether n x n matrices may be kept whole."""
        return KEPT_MATRICES * nodes**2 * bytes_per_entry <= self.memory_gib * 2**30
