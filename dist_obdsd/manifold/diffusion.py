"""The parameters of a target."""

from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Self

import torch

from dist_obdsd.errors import require

KEPT_MATRICES = 4
"""n x n matrices that exist at a time where they are kept: S, A, N or its factor, and one being made."""
CPU_GIB, FREE_SHARE = 2.0, 0.75
"""Memory for them: on a CPU, and of what a GPU has free before the first diffusion."""


@dataclass(frozen=True)
class Diffusion:
    """A target and its computation, by the fields of the section ``distillation``."""

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
    memory_gib: float | None = None

    def __post_init__(self) -> None:
        require("temperature", self.temperature, self.temperature > 0, "above 0")
        require("transition_temperature", self.transition_temperature, self.transition_temperature > 0, "above 0")
        require("omega", self.omega, 0 <= self.omega < 1, "at least 0 and below 1")
        require("neighbours", self.neighbours, self.neighbours is None or self.neighbours > 0, "at least 1 or None")
        require("solver", self.solver, self.solver in ("auto", "cholesky", "cg"), "auto, cholesky or cg")

    @classmethod
    def of(cls, settings: Any) -> Self:
        """Take the fields from an object with such attributes, as a config's section."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})

    def gib(self, device: torch.device) -> float:
        """Return the memory for matrices over all pairs, set or the device's default."""
        return default_gib(device) if self.memory_gib is None else self.memory_gib

    def fits(self, nodes: int, bytes_per_entry: int, device: torch.device) -> bool:
        """Tell whether n x n matrices may be kept whole."""
        return KEPT_MATRICES * nodes**2 * bytes_per_entry <= self.gib(device) * 2**30


@cache
def default_gib(device: torch.device) -> float:
    """Choose a share of a GPU's free memory, once in a process; 2 GiB on a CPU."""
    if device.type != "cuda":
        return CPU_GIB
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return FREE_SHARE * (torch.cuda.mem_get_info(device)[0] + cached) / 2**30
