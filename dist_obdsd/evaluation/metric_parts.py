"""Settings of an evaluation, and metrics of all embeddings together.

Like those of ``metrics``, a metric is a function whose arguments are keywords; it makes an ``EmbeddingMetric``.

Shapes: N images of all ranks, C classes, D embedding dimension.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from dist_obdsd.config.registry import METRICS
from dist_obdsd.errors import InputError, require
from dist_obdsd.evaluation import clustering, geometry
from dist_obdsd.evaluation.metrics import QueryMetric


@dataclass(frozen=True)
class Settings:
    """Settings of an evaluation, as a config's section ``evaluation`` explains them."""

    metrics: Sequence[str] = ("recall", "map@r")
    recall_at: Sequence[int] = (1, 2, 4, 8)
    conventions: str = "correct"
    distance: str = "cosine"
    backend: str = "auto"
    seed: int = 0
    """Of k-means and of the sample that figures show."""
    train_classes: int | None = None
    """Classes that the network was trained on, for ``conventions="released"``."""

    def __post_init__(self) -> None:
        """Raises: InputError: a value that is not one of the choices."""
        require("conventions", self.conventions, self.conventions in ("correct", "released"), "correct or released")
        require("distance", self.distance, self.distance in ("cosine", "euclidean"), "one of cosine, euclidean")
        require("backend", self.backend, self.backend in ("auto", "faiss", "torch"), "one of auto, faiss, torch")
        if isinstance(self.metrics, str) or not self.metrics:
            raise InputError(f"metrics is {self.metrics!r}; give a list of some of {', '.join(METRICS.choices)}")
        if isinstance(self.recall_at, int) or not self.recall_at or any(k != int(k) or k < 1 for k in self.recall_at):
            raise InputError(f"recall_at is {self.recall_at!r}; give a list of whole numbers from 1 on")

    @property
    def released(self) -> bool:
        return self.conventions == "released"

    def build(self) -> list["QueryMetric | EmbeddingMetric"]:
        """Make the metrics in their order, or raise InputError for an unknown one."""
        names = dict.fromkeys(self.metrics)
        return [METRICS.build(name, {}, recall_at=self.recall_at, released=self.released) for name in names]


@dataclass(frozen=True)
class EmbeddingSet:
    """All ranks' images by ascending id, for metrics that know no queries."""

    rows_ND: torch.Tensor
    class_N: torch.Tensor
    """0..C-1."""
    settings: Settings

    @cached_property
    def cluster_N(self) -> torch.Tensor:
        """Clusters of k-means, as many as classes. Collective at first use."""
        k = self.settings.train_classes if self.settings.released else int(self.class_N.max()) + 1
        if k is None:
            raise InputError(
                "evaluation.conventions=released makes as many clusters as there are training classes, which these "
                "images do not tell; take nmi and f1 out of evaluation.metrics, or set evaluation.conventions=correct"
            )
        return clustering.k_means(self.rows_ND, k, seed=self.settings.seed)[0].cpu()


EmbeddingMetric = Callable[[EmbeddingSet], dict[str, float]]
"""A metric of all images together, queries and galleries: printed name -> value. Collective."""


def nmi() -> EmbeddingMetric:
    """Normalised mutual information of classes and k-means clusters (Manning, 16.3)."""
    return lambda of: {"nmi": clustering.nmi(of.class_N, of.cluster_N)}


def f1() -> EmbeddingMetric:
    """F1 over pairs of images that share a k-means cluster (Song et al., CVPR 2016)."""
    return lambda of: {"f1": clustering.pairwise_f1(of.class_N, of.cluster_N)}


def distances(*, released: bool) -> EmbeddingMetric:
    """Mean distances within and between classes, their ratio (Roth, ICML 2020)."""
    return lambda of: geometry.class_distances(of.rows_ND, of.class_N, cosine=released)


def rho_spectrum(*, released: bool) -> EmbeddingMetric:
    """Unevenness of the embedding's directions; 0 is even (Roth, ICML 2020)."""
    return lambda of: {
        "rho_spectrum": geometry.rho_spectrum(geometry.singular_values(of.rows_ND), leave_out=int(released))
    }
