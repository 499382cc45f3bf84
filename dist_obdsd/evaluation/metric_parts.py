"""Metrics that ``config/registry.py`` names, and the settings of an evaluation.

A metric is a function that makes a ``QueryMetric`` or an ``EmbeddingMetric``. Its arguments are keywords, those of
``recall_at`` and ``released`` that it needs.

Shapes: q queries of this rank, k neighbours, N images of all ranks, C classes, D embedding dimension.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from dist_obdsd.config.registry import METRICS
from dist_obdsd.errors import InputError
from dist_obdsd.evaluation import clustering, geometry, metrics


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
        for value, name, choices in (
            (self.conventions, "conventions", ("correct", "released")),
            (self.distance, "distance", ("cosine", "euclidean")),
            (self.backend, "backend", ("auto", "faiss", "torch")),
        ):
            if value not in choices:
                raise InputError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")
        if isinstance(self.metrics, str) or not self.metrics:
            raise InputError(f"metrics is {self.metrics!r}; give a list of some of {', '.join(METRICS.names)}")
        if not self.recall_at or any(k != int(k) or k < 1 for k in self.recall_at):
            raise InputError(f"recall_at is {tuple(self.recall_at)}; give whole numbers from 1 on")

    @property
    def released(self) -> bool:
        return self.conventions == "released"

    def build(self) -> list["QueryMetric | EmbeddingMetric"]:
        """Make the metrics, in their order.

        Raises:
            InputError: there is no metric of that name.
        """
        given = {"recall_at": self.recall_at, "released": self.released}
        return [METRICS.build(name, {}, **given) for name in dict.fromkeys(self.metrics)]


# ---- means over the queries ----


@dataclass(frozen=True)
class QueryMetric:
    """A metric that has one value per query; the mean over the queries is reported."""

    values: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]
    """(neighbour is of the query's class [q, k] bool, R [q], class size [q]) -> printed name -> [q] float64. The class
    size is R, or by the released conventions includes the query."""
    neighbours: Callable[[int, int], int]
    """(largest R, largest class size) -> neighbours that it needs."""
    refuses_less: bool = False
    """Whether a gallery with fewer images is an error. An average precision has seen all there is."""


def recall(*, recall_at: Sequence[int]) -> QueryMetric:
    """Recall@k: an image of the query's class is among the k nearest (Jegou, 2011)."""
    return QueryMetric(
        lambda right, r, size: {f"recall@{k}": value for k, value in metrics.recall_at_k(right, recall_at).items()},
        lambda r, size: max(recall_at),
        refuses_less=True,
    )


def map_at_r() -> QueryMetric:
    """Mean average precision over as many places as images to find (Musgrave, 2020)."""
    return QueryMetric(lambda right, r, size: {"map@r": metrics.map_at_r(right, r)}, lambda r, size: r)


def r_precision() -> QueryMetric:
    """Share of the query's class among the first R places (Manning, section 8.4)."""
    return QueryMetric(lambda right, r, size: {"r_precision": metrics.r_precision(right, r)}, lambda r, size: r)


def map_at_1000(*, released: bool) -> QueryMetric:
    """Mean average precision over the first 1,000 places (Weyand et al., CVPR 2020)."""
    return QueryMetric(
        lambda right, r, size: {"map@1000": metrics.map_at_k(right, r, 1000, size if released else None)},
        lambda r, size: 1000,
    )


def map_at_class_size() -> QueryMetric:
    """The authors' mAP_c: average precision over the class's size; else `map@r`."""
    # In file metrics/mAP_c.py of github.com/Confusezius/Revisiting_Deep_Metric_Learning_PyTorch the class includes the
    # query, so that even a perfect ranking reaches only (c - 1) / c.
    return QueryMetric(lambda right, r, size: {"map@c": metrics.map_at_r(right, size)}, lambda r, size: size)


# ---- of all embeddings ----


@dataclass(frozen=True)
class EmbeddingSet:
    """All ranks' images by ascending id, for metrics that know no queries."""

    rows_ND: torch.Tensor
    class_N: torch.Tensor
    """0..C-1."""
    settings: Settings

    @cached_property
    def cluster_N(self) -> torch.Tensor:
        """Clusters of k-means, as many as classes. Collective at first use.

        Raises:
            InputError: on every rank: the conventions are ``released``, and the number of training classes is unknown.
        """
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
    return lambda of: {"rho_spectrum": geometry.rho_spectrum(of.rows_ND, leave_out=int(released))}
