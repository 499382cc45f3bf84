"""Section of the ranking loss, whose settings are its constructor's arguments.

Formulas, sources and defaults stand beside the code in ``losses/``.
"""

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Discriminator, Tag, create_model

from dist_obdsd.config.base import NonNegative, Positive, Section
from dist_obdsd.config.registry import LOSSES


class RankingConfig(Section):
    """The ranking loss that ``name`` chooses."""

    name: str = "multi_similarity"

    def __reduce__(self) -> Any:
        """Pickle the settings alone, since the class is made when this module is imported."""
        return _restore, (self.model_dump(),)


class LearnableConfig(RankingConfig):
    """A loss with parameters of its own, which have an optimizer of their own."""

    lr: Positive | None = None
    """Learning rate of the loss's own parameters, along optim.schedule; unset: 100 times optim.lr, as the authors of
    proxy anchor chose."""
    weight_decay: NonNegative = 0.0
    """Weight decay of the loss's own parameters."""


def _section(name: str) -> type[RankingConfig]:
    part = LOSSES.source(name)
    learnable = part.bases & {"LearnableLoss", "GatheredLoss"} or name == "package:Class"
    base = LearnableConfig if learnable else RankingConfig
    # A family of losses, such as pml, takes its name as an argument.
    fields: dict[str, Any] = {"name": (Literal[name], name)}
    fields |= {setting.name: (setting.annotation, setting.default) for setting in part.settings}
    return create_model(name, __base__=base, __doc__=part.summary, **fields)


SECTIONS = {name: _section(name) for name in LOSSES.paths}
"""Registered name -> its section."""


def _restore(settings: dict[str, Any]) -> RankingConfig:
    return SECTIONS[LOSSES.entry(settings["name"])](**settings)


def _registered(value: Any) -> str | None:
    default = RankingConfig.model_fields["name"].default
    name = value.get("name", default) if isinstance(value, dict) else getattr(value, "name", None)
    return name if (name := LOSSES.entry(str(name))) in SECTIONS else None


if TYPE_CHECKING:
    Ranking = RankingConfig
else:
    Ranking = Annotated[
        reduce(or_, (Annotated[section, Tag(name)] for name, section in SECTIONS.items())),
        Discriminator(
            _registered,
            custom_error_type="ranking_name",
            custom_error_message=f"ranking.name must be one of {', '.join(SECTIONS)}; pml.NAME is a loss of "
            "pytorch-metric-learning, package:Class one of your own",
        ),
    ]
"""What ``Config.ranking`` holds: one of the sections."""
