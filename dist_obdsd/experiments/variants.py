"""Runs of a comparison: variants x points of a grid x seeds. Runs nothing."""

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_obdsd.config import Config, load_config
from dist_obdsd.config.registry import TARGETS
from dist_obdsd.errors import InputError

RESERVED = {"seed": "--seeds", "name": "the config's name and the variant"}
"""Settings that a comparison makes itself, and from what."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Variant:
    """A named set of overrides."""

    name: str
    overrides: tuple[str, ...]
    """``key=value``, such as ``distillation.target=psd``."""


@dataclass(frozen=True)
class RunSpec:
    """One run of a comparison."""

    variant: str
    point: str
    """The grid's point as ``key=value key=value``; empty without a grid."""
    seed: int
    changes: tuple[str, ...]
    """The overrides of the variant and the point."""
    overrides: tuple[str, ...]
    """All that follows the config on the command line."""
    config: Config

    @property
    def label(self) -> str:
        return f"{self.variant} {self.point}".strip()

    @property
    def run_dir(self) -> Path:
        return self.config.run_dir


def split(text: str) -> list[str]:
    """Cut at commas outside brackets: ``a,[1,2],b`` -> ``a``, ``[1,2]``, ``b``."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def read_variants(text: str) -> list[Variant]:
    """Parse ``none,psd,hot:distillation.target=psd,optim.lr=2`` into three variants.

    A variant that is called like a target has that target; any other has the overrides after its colon.
    """
    found: list[tuple[str, list[str]]] = []
    for part in split(text):
        name, colon, first = part.partition(":")
        if "=" in name:  # one more override of the variant before
            if not found or not found[-1][1]:
                raise InputError(f"--variants has {part!r} without a variant; write NAME:{part}")
            found[-1][1].append(part)
            continue
        if not NAME.fullmatch(name):
            raise InputError(f"--variants has a variant called {name!r}; use letters, digits, '.', '_' and '-'")
        if colon and "=" not in first:
            raise InputError(f"--variants has {part!r}; write NAME:key=value")
        if not colon and name not in TARGETS.choices:
            raise InputError(
                f"--variants has {name!r}, which is no target ({', '.join(TARGETS.choices)}); "
                f"write NAME:key=value for others"
            )
        found.append((name, [first] if colon else []))
    _check_unique([name for name, _ in found], "--variants has the variant")
    for name, overrides in found:
        if name in TARGETS.choices:
            if any(override.startswith("distillation.target=") for override in overrides):
                raise InputError(f"the variant {name} sets distillation.target; call it otherwise, or leave that out")
            overrides.insert(0, f"distillation.target={name}")
    return [Variant(name, tuple(overrides)) for name, overrides in found]


def read_seeds(text: str) -> list[int]:
    """Parse how many seeds (``3`` -> 0, 1, 2) or which (``4,7`` -> 4, 7)."""
    try:
        numbers = [int(part) for part in split(text) if part]
    except ValueError as error:
        raise InputError(f"--seeds is {text!r}; give how many, such as 3, or which, such as 0,1,5") from error
    seeds = numbers if "," in text else list(range(numbers[0] if numbers else 0))
    if not seeds or min(seeds) < 0:
        raise InputError(
            f"--seeds={text} names no seeds; give how many, 1 or more, or which, such as 0,1,5 (0, is seed 0 alone)"
        )
    _check_unique([str(seed) for seed in seeds], "--seeds has")
    return seeds


def read_grid(texts: Sequence[str]) -> list[tuple[str, ...]]:
    """Parse ``["optim.lr=1e-3,1e-4", "epochs=2,4"]`` into four rows of ``key=value``."""
    axes = []
    for text in texts:
        key, equals, values = text.partition("=")
        options = split(values)
        if not equals or not key or "" in options:
            raise InputError(f"--grid {text!r} is not of the form key=value,value, such as optim.lr=0.001,0.0001")
        _check_unique(options, f"--grid {key} has the value")
        axes.append([f"{key}={option}" for option in options])
    _check_unique([axis[0].partition("=")[0] for axis in axes], "--grid has")
    return list(itertools.product(*axes))


def _keys(overrides: Iterable[str]) -> set[str]:
    return {override.partition("=")[0] for override in overrides}


def _check_unique(names: Sequence[str], what: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{what} {name} twice; leave one of them out")


def plan(
    config: Path, overrides: Sequence[str], variants: Sequence[Variant], seeds: Sequence[int],
    grid: Sequence[tuple[str, ...]],
) -> list[RunSpec]:  # fmt: skip
    """List all runs by variant, point of the grid and seed, with checked configs.

    Raises:
        InputError: a setting is at fault or is made by two sides, or two variants are the same.
    """
    common, swept = _keys(overrides), _keys(itertools.chain(*grid))
    varied = {f"the variant {variant.name}": _keys(variant.overrides) for variant in variants}
    for key in sorted(swept.union(common - {"name"}, *varied.values()) & RESERVED.keys()):
        raise InputError(f"a comparison sets {key} itself, from {RESERVED[key]}; leave {key}=... out")
    for owner, keys in (varied | {"the command line": common}).items():
        for key in sorted(swept & keys):
            raise InputError(f"{key} is set by --grid and by {owner}; leave one of them out")
    kept = [override for override in overrides if not override.startswith("name=")]
    specs: list[RunSpec] = []
    for variant, point, seed in itertools.product(variants, grid, seeds):
        changes = (*variant.overrides, *point)
        loaded = load_config(config, [*overrides, *changes, f"seed={seed}"])
        # "optim.lr=0.001" becomes "lr0.001", fit for a folder's name.
        short = [re.sub(r"^([^=]*\.)?([^=]*)=", r"\2", override) for override in point]
        slug = "".join("-" + re.sub(r"[^A-Za-z0-9._-]+", "_", text) for text in short)
        name = f"{loaded.name}-{variant.name}{slug}-seed{seed}"
        own = (*kept, *changes, f"seed={seed}", f"name={name}")
        specs.append(
            RunSpec(variant.name, " ".join(point), seed, changes, own, loaded.model_copy(update={"name": name}))
        )
    _check_different(specs)
    return specs


def _check_different(specs: Sequence[RunSpec]) -> None:
    seen: dict[str, RunSpec] = {}
    for spec in specs:
        shared = f"would share the run folder {spec.run_dir}; give one of them as a variant with another name"
        digest = spec.config.model_copy(update={"name": ""}).digest()
        for key, fault in ((spec.config.name, shared), (digest, "have the same settings; leave one of them out")):
            if (other := seen.setdefault(key, spec)) is not spec:
                raise InputError(f"the variants {other.label} and {spec.label} {fault}")


def baseline_of(variants: Sequence[Variant]) -> str:
    """Return the variant that the others are compared with: ``none``, or the first."""
    return "none" if any(variant.name == "none" for variant in variants) else variants[0].name
