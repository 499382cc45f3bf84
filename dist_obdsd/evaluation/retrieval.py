"""Retrieval from one gallery: search, metrics, the worst and best queries.

With ``conventions: released`` the means are those of the public code (github.com/Confusezius/
Revisiting_Deep_Metric_Learning_PyTorch, folder ``metrics``): the class size in mAP@1000 and mAP_c includes the query
where it stands in the gallery, and a query with nothing to find counts as 0. But that code drops each query's first hit
for the query itself, which among duplicates may be another image; here it is dropped by id.

Every rank knows all rows and asks its share of the queries.

Shapes: N different images of all ranks, n gallery images, q counted queries of this rank, Q of all ranks, k neighbours,
C classes, D embedding dimension.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from dist_obdsd.distributed import collectives
from dist_obdsd.distributed.collectives import met_by_all
from dist_obdsd.distributed.failures import raise_on_all_ranks
from dist_obdsd.errors import InputError
from dist_obdsd.evaluation.eval_index import EvalIndex
from dist_obdsd.evaluation.geometry import EmbeddingSample
from dist_obdsd.evaluation.knn import Gallery
from dist_obdsd.evaluation.metric_parts import Settings
from dist_obdsd.evaluation.metrics import QueryMetric
from dist_obdsd.rng import rng

SHOWN = 16
"""Queries kept as failures, and as many as successes."""
SHOWN_NEIGHBOURS = 8
"""Neighbours kept of each."""


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
class EvaluationResult:
    """Result of one evaluation, or of one of its galleries; the same on every rank."""

    metrics: dict[str, float]
    """``recall@1``, ..., ``map@r``: means over ``queries``. Those of a named gallery are ``NAME/recall@1``, ..."""
    queries: int
    """Queries that the metrics are means over; like ``gallery`` and ``excluded`` summed over the galleries."""
    gallery: int
    """Images searched."""
    excluded: int
    """Further queries that have no other image of their class in the gallery, and so nothing to find."""
    per_class: dict[tuple[str, int], tuple[int, float]]
    """(gallery, label) -> (queries that count, their Recall@1), ascending; classes without such a query are missing."""
    failures: tuple[RankedQuery, ...]
    """By gallery the ``SHOWN`` worst queries: those whose class comes latest among the neighbours searched (or not at
    all); among equals those with the higher score of the first neighbour; then by id."""
    successes: tuple[RankedQuery, ...]
    """By gallery the ``SHOWN`` best queries, one of a class at most: those with the most images of their class among
    the first ``SHOWN_NEIGHBOURS``; among equals in an order drawn at random, but always the same."""
    duplicates: int = 0
    """Images that arrived again under an id already seen, and were dropped."""
    seconds: float = field(default=0.0, compare=False)
    """Wall time on this rank."""
    sample: EmbeddingSample | None = field(default=None, compare=False)
    """What figures show of the embeddings, if it was asked for."""


def retrieve(
    gallery: str, rows_ND: torch.Tensor, index: EvalIndex, metrics: Sequence[QueryMetric], settings: Settings
) -> EvaluationResult:
    """Ask one gallery all queries. Collective; the same result on every rank.

    Args:
        gallery: one of ``index.galleries``.
        rows_ND: all ranks' images by ascending id.

    Raises:
        InputError: no query has a match, or Recall@k asks for more neighbours than there are.
    """
    classes_C, class_N = index.classes
    offered_N = index.gallery_N == (index.galleries.index(gallery) if index.galleries else 0)
    size_N = torch.bincount(class_N[offered_N], minlength=len(classes_C))[class_N]
    count_N = size_N - offered_N.long()  # R: gallery images of the query's class, the query itself excluded
    matched_N = index.asks_N & (count_N > 0)
    asked, matched, offered = int(index.asks_N.sum()), int(matched_N.sum()), int(offered_N.sum())
    # By the released conventions queries without a match count, too.
    counted_N, size_N = (index.asks_N, size_N) if settings.released else (matched_N, count_N)
    own = bool((counted_N & offered_N).any())
    if not matched:
        message = (
            f"none of the {asked} queries has another image of its class among the {offered} gallery images"
            f"{gallery and f' of {gallery}'}; evaluation needs classes with at least two images"
        )
        raise met_by_all(InputError(message))
    largest = int(count_N[counted_N].max()), int(size_N[counted_N].max())
    width = max((metric.neighbours(*largest) for metric in metrics), default=1)
    must = max((metric.neighbours(*largest) for metric in metrics if metric.refuses_less), default=1)
    if must > offered - own:
        message = (
            f"k={must} neighbours are asked for but the gallery offers {offered - own} ({offered} images"
            f"{', less the query itself' if own else ''}); lower k or enlarge the gallery"
        )
        raise met_by_all(InputError(message))
    k = min(width, offered - own)
    place_Q, place_n = counted_N.nonzero().flatten(), offered_N.nonzero().flatten()
    Q, world = len(place_Q), collectives.world_size()
    shares = [slice(Q * rank // world, Q * (rank + 1) // world) for rank in range(world)]
    place_q = place_Q[shares[collectives.rank()]]
    with raise_on_all_ranks("the search"):
        searched = Gallery(taken(rows_ND, place_n), k, distance=settings.distance, backend=settings.backend)
        number_N = torch.where(offered_N, offered_N.cumsum(0) - 1, -1)  # each image's row in the gallery
        relevant, first_scores = [torch.empty(0, k, dtype=torch.bool)], [torch.empty(0, dtype=torch.float64)]
        class_n, class_q = class_N[place_n].int(), class_N[place_q].int()
        own_q = number_N[place_q].to(rows_ND.device)
        for scores_mk, found_mk in searched.search(taken(rows_ND, place_q), own_q, k):
            class_m = class_q[sum(map(len, relevant)) :][: len(found_mk)]
            relevant.append(class_n[found_mk.cpu()] == class_m[:, None])
            first_scores.append(scores_mk[:, 0].cpu())
        relevant_qk, first_score_q = torch.cat(relevant), torch.cat(first_scores)
        widened_qk = _widened(relevant_qk, count_N[place_q], width)
        values: dict[str, torch.Tensor] = {}
        for metric in metrics:
            # A query that has nothing to find and yet counts finds nothing in what is taken for a class of one.
            values |= metric.values(widened_qk, count_N[place_q].clamp(min=1), size_N[place_q].clamp(min=1))
    # argmax finds the first of the largest, so the first hit; k where there is none.
    hit_q = torch.where(relevant_qk.any(dim=1), relevant_qk.byte().argmax(dim=1), k)
    right_q = relevant_qk[:, :SHOWN_NEIGHBOURS].sum(dim=1)
    columns = [column_q.double() for column_q in (hit_q, right_q, first_score_q, *values.values())]
    counts = [share.stop - share.start for share in shares]
    hit_Q, right_Q, score_Q, *values_Q = collectives.gather_ragged(torch.stack(columns, dim=1), counts).numpy().T
    places, class_Q = place_Q.numpy(), class_N[place_Q].numpy()

    worst = np.lexsort((places, -score_Q, -hit_Q))[:SHOWN]  # by the last key first
    ranked = np.lexsort((rng(0, "best queries").permutation(len(index.ids_N))[places], -right_Q))
    best = ranked[np.sort(np.unique(class_Q[ranked], return_index=True)[1])[:SHOWN]]

    # Search once more for these few queries, with exact scores.
    place_s = place_Q[torch.from_numpy(np.concatenate([worst, best]))]
    own_s, most = number_N[place_s].to(rows_ND.device), min(k, SHOWN_NEIGHBOURS)
    scores_sk, found_sk = next(searched.search(rows_ND[place_s.to(rows_ND.device)], own_s, most, exact=most))
    found = place_n[found_sk.cpu()]
    columns = [index.ids_N[place_s], index.labels_N[place_s], index.ids_N[found], index.labels_N[found], scores_sk]
    shown = [
        RankedQuery(gallery, query_id, label, tuple(ids), tuple(labels), tuple(scores))
        for query_id, label, ids, labels, scores in zip(*(of.tolist() for of in columns), strict=True)
    ]
    prefix = f"{gallery}/" if gallery else ""
    queries_C, hits_C = (np.bincount(of, minlength=len(classes_C)).tolist() for of in (class_Q, class_Q[hit_Q == 0]))
    return EvaluationResult(
        metrics={prefix + name: math.fsum(of.tolist()) / Q for name, of in zip(values, values_Q, strict=True)},
        queries=Q,
        gallery=offered,
        excluded=asked - Q,
        per_class={
            (gallery, label): (queries, hits / queries)
            for label, queries, hits in zip(classes_C.tolist(), queries_C, hits_C, strict=True)
            if queries
        },
        failures=tuple(shown[: len(worst)]),
        successes=tuple(shown[len(worst) :]),
    )


def taken(rows_ND: torch.Tensor, place_n: torch.Tensor) -> torch.Tensor:
    """Return the rows at ascending places; a view if they are adjacent."""
    if len(place_n) and int(place_n[-1]) - int(place_n[0]) == len(place_n) - 1:
        return rows_ND[int(place_n[0]) : int(place_n[-1]) + 1]
    return rows_ND[place_n.to(rows_ND.device)]


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
