"""The ranking losses, one section each; ``ranking.name`` chooses. Defaults are the published ones.

Formulas and sources stand beside the code in ``objective/ranking/``.
"""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from dist_obdsd.config.base import NonNegative, Positive, Section


class LearnableConfig(Section):
    """A loss with parameters of its own, which have an optimizer of their own."""

    lr: Positive | None = None
    """Learning rate of the loss's own parameters, along optim.schedule; unset: 100 times optim.lr, as the authors of
    proxy anchor chose."""
    weight_decay: NonNegative = 0.0
    """Of the loss's own parameters."""


class MultiSimilarityConfig(Section):
    name: Literal["multi_similarity"] = "multi_similarity"
    alpha: Positive = 2.0
    beta: Positive = 40.0
    threshold: float = 0.5
    """The similarity lambda that positives should exceed and negatives stay below."""
    margin: NonNegative = 0.1
    """The mining margin epsilon."""


class ContrastiveConfig(Section):
    name: Literal["contrastive"] = "contrastive"
    positive_margin: NonNegative = 0.0
    """Distance up to which a positive pair costs nothing."""
    negative_margin: Positive = 0.5
    """Distance from which a negative pair costs nothing; unit rows are at most 2 apart."""


class TripletConfig(Section):
    name: Literal["triplet"] = "triplet"
    margin: Positive = 0.2
    """How much farther than the positive the negative should be."""


class MarginConfig(LearnableConfig):
    name: Literal["margin"] = "margin"
    alpha: Positive = 0.2
    """Half width of the band around the boundary beta."""
    beta: Positive = 1.2
    """The boundary's initial distance; it is learned."""
    per_class: bool = True
    """One boundary per class instead of one for all."""
    nu: NonNegative = 0.0
    """Weight of the penalty on beta."""
    cutoff: Positive = 0.5
    """Distance below which a negative is drawn as if it were this far away."""
    nonzero_cutoff: Positive = 1.4
    """Distance above which a negative is never drawn."""


class ProxyAnchorConfig(LearnableConfig):
    name: Literal["proxy_anchor"] = "proxy_anchor"
    alpha: Positive = 32.0
    delta: NonNegative = 0.1


class PytorchMetricLearningConfig(LearnableConfig):
    """Any loss of pytorch-metric-learning, over the gathered batch."""

    name: Annotated[str, Field(pattern=r"^pml\.\w+$")]
    """``pml.`` and the loss's name there, such as ``pml.ArcFaceLoss``."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of its constructor. The number of classes and the embedding's length are filled in."""
    miner: Annotated[str, Field(pattern=r"^pml\.\w+$")] | None = None
    """A miner there, such as ``pml.MultiSimilarityMiner``."""
    miner_kwargs: dict[str, Any] = Field(default_factory=dict)


NATIVE = (MultiSimilarityConfig, ContrastiveConfig, TripletConfig, MarginConfig, ProxyAnchorConfig)
TAGS = {section.model_fields["name"].default: section for section in NATIVE} | {"pml": PytorchMetricLearningConfig}


def _tag(value: Any) -> str | None:
    name = value.get("name", "multi_similarity") if isinstance(value, dict) else getattr(value, "name", None)
    name = str(name).partition(".")[0]
    return name if name in TAGS else None


RankingConfig = Annotated[
    Annotated[MultiSimilarityConfig, Tag("multi_similarity")]
    | Annotated[ContrastiveConfig, Tag("contrastive")]
    | Annotated[TripletConfig, Tag("triplet")]
    | Annotated[MarginConfig, Tag("margin")]
    | Annotated[ProxyAnchorConfig, Tag("proxy_anchor")]
    | Annotated[PytorchMetricLearningConfig, Tag("pml")],
    Discriminator(
        _tag,
        custom_error_type="ranking_name",
        custom_error_message="ranking.name must be "
        f"{', '.join(n for n in TAGS if n != 'pml')} or, for a loss of pytorch-metric-learning, pml.NAME",
    ),
]
