"""Metrics that ``config/registry.py`` names, and the settings of an evaluation.

A metric is a function that makes a ``QueryMetric`` or an ``EmbeddingMetric``. Its arguments are keywords, those of
``recall_at``, ``released``, ``seed`` and ``train_classes`` that it needs.

Shapes: q queries of this rank, k neighbours, n images of this rank, N of all ranks, D embedding dimension.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from dist_obdsd.config.registry import METRICS
from dist_obdsd.errors import InputError
from dist_obdsd.evaluation import clustering, geometry, metrics
from dist_obdsd.evaluation.row_blocks import RowBlocks, build_row_blocks


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
        choices = {
            "conventions": ("correct", "released"),
            "distance": ("cosine", "euclidean"),
            "backend": ("auto", "faiss", "torch"),
        }
        for name, values in choices.items():
            if getattr(self, name) not in values:
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(values)}")
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
        given = {name: getattr(self, name) for name in ("recall_at", "released", "seed", "train_classes")}
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
    """Recall@k: is an image of the query's class among the k nearest (Jegou et al., 2011)?"""

    def values(right_qk: torch.Tensor, r_q: torch.Tensor, size_q: torch.Tensor) -> dict[str, torch.Tensor]:
        return {f"recall@{k}": value_q for k, value_q in metrics.recall_at_k(right_qk, recall_at).items()}

    return QueryMetric(values, lambda r, size: max(recall_at), refuses_less=True)


def map_at_r() -> QueryMetric:
    """Mean average precision over the first R places, R the images to find (Musgrave et al., ECCV 2020)."""
    return QueryMetric(lambda right_qk, r_q, _: {"map@r": metrics.map_at_r(right_qk, r_q)}, lambda r, size: r)


def r_precision() -> QueryMetric:
    """Share of the query's class among the first R places (Manning et al., section 8.4)."""
    return QueryMetric(lambda right_qk, r_q, _: {"r_precision": metrics.r_precision(right_qk, r_q)}, lambda r, size: r)


def map_at_1000(*, released: bool) -> QueryMetric:
    """Mean average precision over the first 1,000 places (Weyand et al., CVPR 2020, equation 3)."""

    def values(right_qk: torch.Tensor, r_q: torch.Tensor, size_q: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"map@1000": metrics.map_at_k(right_qk, r_q, 1000, size_q if released else None)}

    return QueryMetric(values, lambda r, size: 1000)


def map_at_class_size() -> QueryMetric:
    """The authors' mAP_c: average precision over as many places as the class has images; `map@r` if not `released`."""
    return QueryMetric(
        lambda right_qk, _, size_q: {"map@c": metrics.map_at_class_size(right_qk, size_q)}, lambda r, size: size
    )


# ---- of all embeddings ----


class EmbeddingSet:
    """All ranks' images, each on one rank, as the metrics that know no queries see them."""

    def __init__(self, rows_nD: torch.Tensor, place_n: torch.Tensor, class_N: torch.Tensor) -> None:
        """Keep this rank's rows.

        Args:
            place_n: each row's place by ascending id among those of all ranks.
            class_N: every image's class by ascending id, 0..C-1; the same on every rank.
        """
        self.rows_nD, self.place_n, self.class_N = rows_nD, place_n, class_N
        self._clusters: dict[tuple[int, int], torch.Tensor] = {}

    @cached_property
    def blocks(self) -> RowBlocks:
        """The rows by id. Collective when first asked for."""
        return build_row_blocks(self.rows_nD, self.place_n)

    def clusters(self, released: bool, seed: int, train_classes: int | None) -> torch.Tensor:
        """Cluster by k-means into as many clusters as classes, [N]; once, however many metrics ask. Collective.

        Raises:
            InputError: on every rank: ``released`` without the number of training classes.
        """
        k = train_classes if released else int(self.class_N.max()) + 1
        if k is None:
            raise InputError(
                "evaluation.conventions=released makes as many clusters as there are training classes, which these "
                "images do not tell; take nmi and f1 out of evaluation.metrics, or set evaluation.conventions=correct"
            )
        if (k, seed) not in self._clusters:
            self._clusters[k, seed] = clustering.k_means(self.blocks, k, seed=seed)[0].cpu()
        return self._clusters[k, seed]


EmbeddingMetric = Callable[[EmbeddingSet], dict[str, float]]
"""A metric of all images together, queries and galleries: printed name -> value. Collective."""


def nmi(*, released: bool, seed: int, train_classes: int | None) -> EmbeddingMetric:
    """Normalised mutual information of the classes and k-means clusters (Manning et al., section 16.3)."""
    return lambda of: {"nmi": clustering.nmi(of.class_N, of.clusters(released, seed, train_classes))}


def f1(*, released: bool, seed: int, train_classes: int | None) -> EmbeddingMetric:
    """F1 over pairs of images that share a k-means cluster (Song et al., CVPR 2016)."""
    return lambda of: {"f1": clustering.pairwise_f1(of.class_N, of.clusters(released, seed, train_classes))}


def distances(*, released: bool) -> EmbeddingMetric:
    """Mean distances within and between classes, and their ratio (Roth et al., ICML 2020, section 5)."""
    return lambda of: geometry.class_distances(of.rows_nD, of.place_n, of.class_N, cosine=released)


def rho_spectrum(*, released: bool) -> EmbeddingMetric:
    """How unevenly the embedding uses its directions; 0 if evenly (Roth et al., ICML 2020, section 5.3)."""
    return lambda of: {"rho_spectrum": geometry.rho_spectrum(of.blocks, leave_out=int(released))}
