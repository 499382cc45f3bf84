"""Named parts that a config chooses between, and the file of each.

To add a ranking loss, a target, a metric, a backbone, a reader or a strategy: write one file, and add its line here.
Validation, ``--help``, the builders and the tables in the docs read these lists. A part is imported when first used.
Its arguments are known before that, from its source: the positional ones are a user's settings.
"""

import importlib
import inspect
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dist_obdsd.config.signature import Source, read_source
from dist_obdsd.errors import InputError, UserError, format_error


@dataclass(frozen=True)
class Registry:
    """One kind of part."""

    kind: str
    """Its name in the docs, such as ``ranking loss``."""
    setting: str
    """The setting that chooses one, such as ``ranking.name``."""
    paths: Mapping[str, str]
    """Name -> ``module:attribute``. A name ending in NAME stands for many, one with a colon for every import path."""

    @property
    def choices(self) -> list[str]:
        """The values that the setting takes."""
        return list(self.paths)

    def entry(self, name: str) -> str:
        """Return the first registered name that stands for ``name``, else ``name``."""

        def stands_for_it(entry: str) -> bool:
            start, many, _ = entry.partition("NAME")
            return name == entry or (":" in entry and ":" in name) or bool(many and name.startswith(start))

        return next(filter(stands_for_it, self.paths), name)

    def check(self, name: str) -> str:
        """Return ``name``, or raise ValueError with the names that are registered."""
        if self.entry(name) not in self.choices:
            raise ValueError(f"{self.setting} is {name!r}; set it to one of {', '.join(self.choices)}")
        return name

    def load(self, name: str) -> Any:
        """Import the part called ``name``, or raise InputError."""
        try:
            module, _, attribute = self.paths[self.entry(self.check(name))].partition(":")
        except ValueError as error:
            raise InputError(str(error)) from error
        with plug_in(f"{self.setting}={name}"):
            return getattr(importlib.import_module(module), attribute)

    def build(self, name: str, settings: Mapping[str, Any], /, **arguments: Any) -> Any:
        """Make the part called ``name`` of its settings and the arguments it takes."""
        make = self.load(name)
        taken = inspect.signature(make).parameters
        with plug_in(f"{self.setting}={name}"):
            return make(**settings, **{name: value for name, value in arguments.items() if name in taken})

    def source(self, name: str) -> Source:
        """Read a part's arguments and docstring without importing it."""
        return read_source(self.paths[self.entry(name)])


def import_object(path: str, setting: str) -> Any:
    """Import ``package.module:name``, which a setting names, or raise InputError."""
    name, _, attribute = path.partition(":")
    with plug_in(f"{setting}={path}"):
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise InputError(
                f"{setting}={path} cannot be imported ({error}); install the package that has it, or put its folder on "
                f"PYTHONPATH"
            ) from error
        if not hasattr(module, attribute):
            raise InputError(f"{setting}={path}, but {module.__file__} defines no {attribute}; give a name that it has")
        return getattr(module, attribute)


@contextmanager
def plug_in(choice: str) -> Iterator[None]:
    """Turn an error of a part's own code into an InputError with its file and line.

    Args:
        choice: the setting and its value, such as ``ranking.name=package:Class``.
    """
    try:
        yield
    except (UserError, ModuleNotFoundError):
        raise
    except Exception as error:
        libraries = tuple(sysconfig.get_path(kind) for kind in ("stdlib", "purelib", "platlib"))
        frames = traceback.extract_tb(error.__traceback__)
        last = ([frame for frame in frames if not frame.filename.startswith(libraries)] or frames)[-1]
        raise _failure(choice, error, last) from error


def plug_in_failure(error: Exception, choices: Mapping[str, str]) -> InputError | None:
    """Explain an error that the code of a plug-in raised while it was used.

    Args:
        choices: setting -> its value, which may be a name of ours or ``package.module:name``.
    """
    frames = traceback.extract_tb(error.__traceback__)
    for setting, path in choices.items():
        module = sys.modules.get(path.partition(":")[0]) if ":" in path else None
        if own := [frame for frame in frames if module and frame.filename == module.__file__]:
            return _failure(f"{setting}={path}", error, own[-1])
    return None


def _failure(choice: str, error: Exception, at: traceback.FrameSummary) -> InputError:
    # A syntax error says its place itself.
    place = "" if isinstance(error, SyntaxError) else f" ({at.filename}, line {at.lineno})"
    return InputError(f"{choice} fails with {' '.join(format_error(error).split())}{place}; mend it there")


LOSSES = Registry(
    "ranking loss",
    "ranking.name",
    {
        "multi_similarity": "dist_obdsd.losses.multi_similarity:MultiSimilarityLoss",
        "contrastive": "dist_obdsd.losses.contrastive:ContrastiveLoss",
        "triplet": "dist_obdsd.losses.triplet:TripletLoss",
        "margin": "dist_obdsd.losses.margin:MarginLoss",
        "proxy_anchor": "dist_obdsd.losses.proxy_anchor:ProxyAnchorLoss",
        "package:Class": "dist_obdsd.losses.gathered:own_loss",
        "pml.NAME": "dist_obdsd.losses.pml:PMLLoss",
    },
)


class TargetRegistry(Registry):
    """Targets, ``none`` among the choices."""

    @property
    def choices(self) -> list[str]:
        return ["none", *self.paths]

    def load(self, name: str) -> Any:
        target = super().load(name)
        return target if name in self.paths else target(path=name)


TARGETS = TargetRegistry(
    "target",
    "distillation.target",
    {
        "uniform": "dist_obdsd.manifold.targets:Uniform",
        "psd": "dist_obdsd.manifold.targets:PSD",
        "obdsd": "dist_obdsd.manifold.targets:OBDSD",
        "obdsd_symmetric": "dist_obdsd.manifold.targets:SymmetricOBDSD",
        "package:function": "dist_obdsd.manifold.targets:OwnTarget",
    },
)

METRICS = Registry(
    "metric",
    "evaluation.metrics",
    {
        "recall": "dist_obdsd.evaluation.metrics:recall",
        "map@r": "dist_obdsd.evaluation.metrics:map_at_r",
        "r_precision": "dist_obdsd.evaluation.metrics:r_precision",
        "map@1000": "dist_obdsd.evaluation.metrics:map_at_1000",
        "map@c": "dist_obdsd.evaluation.metrics:map_at_class_size",
        "nmi": "dist_obdsd.evaluation.metric_parts:nmi",
        "f1": "dist_obdsd.evaluation.metric_parts:f1",
        "distances": "dist_obdsd.evaluation.metric_parts:distances",
        "rho_spectrum": "dist_obdsd.evaluation.metric_parts:rho_spectrum",
    },
)

USUAL = ("small_cnn", "resnet18", "resnet34", "resnet50", "squeezenet1_0")
"""Backbones with the size and the normalisation that are usual for ImageNet, whatever their weights."""


class BackboneRegistry(Registry):
    """Backbones, most of which only a library knows by name."""

    def library(self, name: str) -> str | None:
        """Return the library that has published weights of a backbone."""
        return {"NAME": "torchvision", "timm/NAME": "timm"}.get(self.entry(name))

    def gives_map(self, name: str) -> bool:
        """Tell if a backbone of torchvision or ours ends in a map that is pooled here."""
        return name == "small_cnn" or bool(re.match(r"(wide_)?res(net|next)\d|squeezenet", name))

    def input_defaults(self, name: str, pretrained: str) -> Mapping[str, Any]:
        """Look up a backbone's own image_size, mean and std, or raise InputError."""
        if ":" in name or name in USUAL:  # without importing a library, which takes seconds
            return {"image_size": 224, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
        backbones: Any = importlib.import_module("dist_obdsd.models.backbones")
        return backbones.input_defaults(name, pretrained)


BACKBONES = BackboneRegistry(
    "backbone",
    "model.backbone",
    {
        "small_cnn": "dist_obdsd.models.backbones:small_cnn",
        "timm/NAME": "dist_obdsd.models.backbones:timm_model",
        "package:function": "dist_obdsd.models.backbones:own_model",
        "NAME": "dist_obdsd.models.backbones:torchvision_model",
    },
)

STRATEGIES = Registry(
    "strategy",
    "strategy",
    {
        "ddp": "dist_obdsd.training.ddp:DDPStrategy",
        "deepspeed": "dist_obdsd.training.deepspeed:DeepSpeedStrategy",
        "fsdp": "dist_obdsd.training.fsdp:FSDPStrategy",
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
