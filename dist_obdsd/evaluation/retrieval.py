"""Retrieval from one gallery: search, metrics, the worst and best queries.

With ``conventions: released`` the means are those of the public code (github.com/Confusezius/
Revisiting_Deep_Metric_Learning_PyTorch, folder ``metrics``): the class size in mAP@1000 and mAP_c includes the query
where it stands in the gallery, and a query with nothing to find counts as 0. One thing is not repeated: that code drops
each query's first hit for the query itself, which among duplicates may be another image; here it is dropped by id.

Shapes: n images of this rank, N different images of all ranks, q counted queries of this rank, Q of all ranks,
k neighbours, C classes, D embedding dimension.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from dist_obdsd.distributed import collectives
from dist_obdsd.distributed.failures import raise_on_all_ranks
from dist_obdsd.errors import InputError
from dist_obdsd.evaluation.eval_index import EvalIndex
from dist_obdsd.evaluation.knn import Gallery
from dist_obdsd.evaluation.metric_parts import QueryMetric, Settings
from dist_obdsd.rng import rng

SHOWN = 16
"""Queries kept as failures, and as many as successes."""
SHOWN_NEIGHBOURS = 8
"""Neighbours kept of each."""


@dataclass(frozen=True)
class Counts:
    """Numbers of queries and images of one gallery."""

    queries: int
    """Queries that the metrics are means over."""
    gallery: int
    """Images searched."""
    excluded: int
    """Further queries that have no other image of their class in the gallery, and so nothing to find."""


@dataclass(frozen=True)
class ClassRecall:
    """Recall@1 of the queries of one class."""

    gallery: str
    label: int
    queries: int
    recall: float


@dataclass(frozen=True)
class RankedQuery:
    """A query with its nearest neighbours, best first."""

    gallery: str
    query_id: int
    query_label: int
    neighbour_ids: tuple[int, ...]
    neighbour_labels: tuple[int, ...]
    neighbour_scores: tuple[float, ...]


@dataclass(frozen=True)
class Retrieval:
    """The answers of one gallery; the same on every rank."""

    metrics: dict[str, float]
    counts: Counts
    per_class: tuple[ClassRecall, ...]
    """By label; classes without a counted query are missing."""
    failures: tuple[RankedQuery, ...]
    """The ``SHOWN`` worst queries: those whose class comes latest among the neighbours searched (or not at all); among
    equals those with the higher score of the first neighbour; then by id."""
    successes: tuple[RankedQuery, ...]
    """The ``SHOWN`` best queries, one of a class at most: those with the most images of their class among the first
    ``SHOWN_NEIGHBOURS``; among equals in an order drawn at random, but always the same."""


def retrieve(
    gallery: str,
    rows_nD: torch.Tensor,
    place_n: torch.Tensor,
    index: EvalIndex,
    metrics: Sequence[QueryMetric],
    settings: Settings,
) -> Retrieval:
    """Ask one gallery all queries. Collective; the same result on every rank.

    Args:
        gallery: one of ``index.galleries``.
        rows_nD: this rank's images, each image on one rank only.
        place_n: their places in the index.

    Raises:
        InputError: no query has a match, or Recall@k asks for more neighbours than there are.
    """
    classes_C, class_N = index.classes
    offered_N = index.gallery_N == _number(index, gallery)
    size_N = torch.bincount(class_N[offered_N], minlength=classes_C.numel())[class_N]
    count_N = size_N - offered_N.long()  # R: gallery images of the query's class, the query itself excluded
    matched_N = index.asks_N & (count_N > 0)
    asked, matched, offered = int(index.asks_N.sum()), int(matched_N.sum()), int(offered_N.sum())
    with raise_on_all_ranks("the count of queries"):
        if not matched:
            raise InputError(
                f"none of the {asked} queries has another image of its class among the {offered} gallery images"
                f"{gallery and f' of {gallery}'}; evaluation needs classes with at least two images"
            )
    if settings.released:  # queries without a match count, too
        counted_N = index.asks_N
    else:
        counted_N, size_N = matched_N, count_N

    largest = int(count_N[counted_N].max()), int(size_N[counted_N].max())
    width = max((metric.neighbours(*largest) for metric in metrics), default=1)
    must = max((metric.neighbours(*largest) for metric in metrics if metric.refuses_less), default=1)
    k = min(width, max(must, offered - bool((counted_N & offered_N).any())))
    asking_n, offering_n = counted_N[place_n], offered_N[place_n]
    place_q, query_qD = place_n[asking_n], taken(rows_nD, asking_n)
    with raise_on_all_ranks("the search backend"):
        # A place stands for an id, and leads to the class at once.
        searched = Gallery(
            taken(rows_nD, offering_n), place_n[offering_n].to(rows_nD.device), k,
            distance=settings.distance, backend=settings.backend,
        )  # fmt: skip
    relevant, first_scores = [torch.empty(0, k, dtype=torch.bool)], [torch.empty(0, dtype=torch.float64)]
    compact_N, done = class_N.int(), 0
    for scores_mk, found_mk in searched.search(query_qD, place_q.to(rows_nD.device), k):
        own_m = place_q[done : done + len(found_mk)]
        relevant.append(compact_N[found_mk.cpu()] == compact_N[own_m][:, None])
        first_scores.append(scores_mk[:, 0].cpu())
        done += len(found_mk)
    relevant_qk, first_score_q = torch.cat(relevant), torch.cat(first_scores)
    widened_qk = _widened(relevant_qk, count_N[place_q], width)
    values: dict[str, torch.Tensor] = {}
    for metric in metrics:
        # A query that has nothing to find and yet counts finds nothing in what is taken for a class of one.
        values |= metric.values(widened_qk, count_N[place_q].clamp(min=1), size_N[place_q].clamp(min=1))
    # argmax finds the first of the largest, so the first hit; k where there is none.
    hit_q = torch.where(relevant_qk.any(dim=1), relevant_qk.byte().argmax(dim=1), k)
    right_q = relevant_qk[:, :SHOWN_NEIGHBOURS].sum(dim=1)
    columns = [column_q.double() for column_q in (place_q, hit_q, right_q, first_score_q, *values.values())]
    all_QM = collectives.gather_ragged(torch.stack(columns, dim=1)).numpy()
    place_Q, hit_Q, right_Q, score_Q, *values_Q = all_QM[all_QM[:, 0].argsort()].T
    place_Q = place_Q.astype(np.int64)
    class_Q = class_N.numpy()[place_Q]

    worst = np.lexsort((place_Q, -score_Q, -hit_Q))[:SHOWN]  # by the last key first
    ranked = np.lexsort((rng(0, "best queries").permutation(len(index))[place_Q], -right_Q))
    best = ranked[np.sort(np.unique(class_Q[ranked], return_index=True)[1])[:SHOWN]]
    shown_q = torch.isin(place_q, torch.from_numpy(place_Q[np.concatenate([worst, best])]))
    answers = _answers(gallery, searched, query_qD[shown_q], place_q[shown_q], min(k, SHOWN_NEIGHBOURS), index)
    queries_C, hits_C = (np.bincount(of, minlength=len(classes_C)) for of in (class_Q, class_Q[hit_Q == 0]))
    return Retrieval(
        metrics={name: math.fsum(of.tolist()) / len(of) for name, of in zip(values, values_Q, strict=True)},
        counts=Counts(queries=len(place_Q), gallery=offered, excluded=asked - len(place_Q)),
        per_class=tuple(
            ClassRecall(gallery, label, int(queries), int(hits) / int(queries))
            for label, queries, hits in zip(classes_C.tolist(), queries_C, hits_C, strict=True)
            if queries
        ),
        failures=tuple(answers[place] for place in place_Q[worst].tolist()),
        successes=tuple(answers[place] for place in place_Q[best].tolist()),
    )


def taken(rows_nD: torch.Tensor, wanted_n: torch.Tensor) -> torch.Tensor:
    """Return the rows that are wanted, without a copy if those are all."""
    return rows_nD if wanted_n.all() else rows_nD[wanted_n.to(rows_nD.device)]


def _widened(relevant_qk: torch.Tensor, count_q: torch.Tensor, width: int) -> torch.Tensor:
    """Add places beyond the end of the gallery, where there is nothing to find.

    Where some queries are gallery images and some are not, the search ended one image early for the latter; that one is
    of the query's class exactly if the class is not complete yet.
    """
    k = relevant_qk.shape[1]
    if k == width:
        return relevant_qk
    relevant_qk, found_q = nn.functional.pad(relevant_qk, (0, width - k)), relevant_qk.sum(dim=1)
    relevant_qk[:, k] = found_q < count_q
    return relevant_qk


def _number(index: EvalIndex, gallery: str) -> int:
    return index.galleries.index(gallery) if gallery in index.galleries else len(index.galleries)


def _answers(
    gallery: str, searched: Gallery, query_qD: torch.Tensor, place_q: torch.Tensor, k: int, index: EvalIndex
) -> dict[int, RankedQuery]:
    """Search once more for a few queries, with exact scores: place -> the query, of all ranks' queries. Collective."""
    own: list[tuple[int, list[int], list[float]]] = []
    ids_N, labels_N = index.ids_N, index.labels_N
    for scores_mk, found_mk in searched.search(query_qD, place_q.to(query_qD.device), k, exact=k):
        own += zip(place_q.tolist(), found_mk.tolist(), scores_mk.tolist(), strict=True)  # they fit one block
    return {
        place: RankedQuery(
            gallery,
            query_id=int(ids_N[place]),
            query_label=int(labels_N[place]),
            neighbour_ids=tuple(ids_N[found].tolist()),
            neighbour_labels=tuple(labels_N[found].tolist()),
            neighbour_scores=tuple(scores),
        )
        for of_rank in collectives.gather_json(own)
        for place, found, scores in of_rank
    }
