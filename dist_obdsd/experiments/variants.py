"""Which runs a comparison is made of: arms, times the points of a grid, times seeds. Reads the config, runs nothing."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from dist_obdsd.config import Config, DistillationConfig, load_config
from dist_obdsd.errors import InputError

TARGETS = get_args(DistillationConfig.model_fields["target"].annotation)
RESERVED = {"seed": "--seeds", "name": "the config's name and the arm"}
"""What a comparison sets itself, and from what."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Arm:
    name: str
    settings: tuple[str, ...]
    """``key=value``, such as ``distillation.target=psd``."""

    @property
    def keys(self) -> set[str]:
        return {setting.partition("=")[0] for setting in self.settings}


@dataclass(frozen=True)
class Child:
    """One run of the comparison."""

    arm: str
    point: str
    """Of the grid, as ``key=value key=value``; empty where there is no grid."""
    seed: int
    declared: tuple[str, ...]
    """What the arm and the point of the grid set."""
    overrides: tuple[str, ...]
    """All that follows the config on the command line."""
    settings: Config

    @property
    def label(self) -> str:
        return f"{self.arm} {self.point}".strip()

    @property
    def run_dir(self) -> Path:
        return self.settings.run_dir


def split(text: str) -> list[str]:
    """Cut at the commas that stand in no bracket: ``a,[1,2],b`` -> ``a``, ``[1,2]``, ``b``."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def read_arms(text: str) -> list[Arm]:
    """``none,psd,hot:distillation.target=psd,distillation.temperature=2`` -> three arms.

    An arm that is called like a target has that target; any other has what it sets itself.

    Raises:
        InputError: an arm without a name or settings, or a name twice.
    """
    found: list[tuple[str, list[str]]] = []
    for part in split(text):
        head, equals, _ = part.partition("=")
        name, colon, first = part.partition(":")
        if equals and ":" not in head:  # one more setting of the arm before
            if not found or not found[-1][1]:
                raise InputError(f"--arms has {part!r} without an arm; write NAME:{part}")
            found[-1][1].append(part)
            continue
        if not NAME.fullmatch(name):
            raise InputError(f"--arms has an arm called {name!r}; use letters, digits, '.', '_' and '-'")
        if colon and "=" not in first:
            raise InputError(f"--arms has {part!r}; write NAME:key=value")
        if not colon and name not in TARGETS:
            raise InputError(
                f"--arms has {name!r}, which is no target ({', '.join(TARGETS)}); write NAME:key=value for other arms"
            )
        found.append((name, [first] if colon else []))
    arms = []
    for name, given in found:
        settings = given
        if name in TARGETS:
            own = [setting for setting in given if setting.startswith("distillation.target=")]
            if own and own[-1] != f"distillation.target={name}":
                raise InputError(f"the arm {name} sets {own[-1]}; call it otherwise, or leave that out")
            settings = [f"distillation.target={name}", *(setting for setting in given if setting not in own)]
        arms.append(Arm(name, tuple(settings)))
    _once([arm.name for arm in arms], "--arms has the arm")
    return arms


def read_seeds(text: str) -> list[int]:
    """``3`` -> 0, 1, 2; ``4,7`` -> 4, 7.

    Raises:
        InputError: no numbers, none at all, or one twice.
    """
    try:
        numbers = [int(part) for part in split(text) if part]
    except ValueError as error:
        raise InputError(f"--seeds is {text!r}; give how many, such as 3, or which, such as 0,1,5") from error
    seeds = numbers if "," in text else list(range(numbers[0] if numbers else 0))
    if not seeds or min(seeds) < 0:
        raise InputError(f"--seeds={text} names no seeds; give 1 or more")
    _once([str(seed) for seed in seeds], "--seeds has")
    return seeds


def read_grid(texts: Sequence[str]) -> list[tuple[str, ...]]:
    """``["optim.lr=1e-3,1e-4", "epochs=2,4"]`` -> four points, each a row of ``key=value``.

    Raises:
        InputError: an entry without values, or a key or a value twice.
    """
    axes = []
    for text in texts:
        key, equals, values = text.partition("=")
        options = split(values)
        if not equals or not key or "" in options:
            raise InputError(f"--grid {text!r} is not of the form key=value,value, such as optim.lr=0.001,0.0001")
        _once(options, f"--grid {key} has the value")
        axes.append([f"{key}={option}" for option in options])
    _once([axis[0].partition("=")[0] for axis in axes], "--grid has")
    return list(itertools.product(*axes))


def _once(names: Sequence[str], what: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{what} {name} twice; leave one of them out")


def plan(
    config: Path, overrides: Sequence[str], arms: Sequence[Arm], seeds: Sequence[int], grid: Sequence[tuple[str, ...]]
) -> list[Child]:
    """All runs, seed by seed within a point of the grid within an arm. Every one's config is checked.

    Raises:
        InputError: a setting is at fault, is set by two sides, or two arms are the same.
    """
    common = {override.partition("=")[0] for override in overrides}
    swept = {setting.partition("=")[0] for point in grid for setting in point}
    for key in sorted(swept.union(common - {"name"}, *(arm.keys for arm in arms)) & RESERVED.keys()):
        raise InputError(f"a comparison sets {key} itself, from {RESERVED[key]}; leave {key}=... out")
    for key in sorted(swept):
        owners = [f"the arm {arm.name}" for arm in arms if key in arm.keys] + ["the command line"] * (key in common)
        if owners:
            raise InputError(f"{key} is set by --grid and by {owners[0]}; leave one of them out")
    kept = [override for override in overrides if not override.startswith("name=")]
    children: list[Child] = []
    for arm, point, seed in itertools.product(arms, grid, seeds):
        declared = (*arm.settings, *point)
        settings = load_config(config, [*overrides, *declared, f"seed={seed}"])
        slug = "".join(f"-{_slug(setting)}" for setting in point)
        name = f"{settings.name}-{arm.name}{slug}-seed{seed}"
        settings = settings.model_copy(update={"name": name})
        own = (*kept, *declared, f"seed={seed}", f"name={name}")
        children.append(Child(arm.name, " ".join(point), seed, declared, own, settings))
    _check_different(children)
    return children


def _slug(setting: str) -> str:
    """``optim.lr=0.001`` -> ``lr0.001``, fit for a folder's name."""
    key, _, value = setting.partition("=")
    return re.sub(r"[^A-Za-z0-9._-]+", "_", key.rpartition(".")[2] + value)


def _check_different(children: Sequence[Child]) -> None:
    names: dict[str, Child] = {}
    digests: dict[str, Child] = {}
    for child in children:
        other = names.setdefault(child.settings.name, child)
        if other is not child:
            raise InputError(
                f"the arms {other.label} and {child.label} would share the run folder {child.run_dir}; "
                f"give one of them as an arm with another name"
            )
        digest = child.settings.model_copy(update={"name": ""}).digest()
        other = digests.setdefault(digest, child)
        if other is not child:
            raise InputError(f"the arms {other.label} and {child.label} have the same settings; leave one of them out")


def baseline_of(arms: Sequence[Arm]) -> str:
    """The arm that the others are compared with: ``none``, or the first."""
    return "none" if any(arm.name == "none" for arm in arms) else arms[0].name
