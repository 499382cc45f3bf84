"""What one gallery answers to the queries: the search, the metrics over it, and where it went wrong.

With ``conventions: released`` the means are those of the public code (github.com/Confusezius/
Revisiting_Deep_Metric_Learning_PyTorch, folder ``metrics``): the class size in mAP@1000 and mAP_c includes the query
where it stands in the gallery, and a query with nothing to find counts as 0. One thing is not repeated: that code drops
each query's first hit for the query itself, which among duplicates may be another image; here it is dropped by id.

Shapes: n images of this rank, N different images of all ranks, q counted queries of this rank, Q of all ranks,
k neighbours, C classes, D embedding dimension.
"""

import math
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import nn

from dist_obdsd.config import EvaluationConfig
from dist_obdsd.distributed import collectives
from dist_obdsd.distributed.failures import raise_on_all_ranks
from dist_obdsd.errors import InputError
from dist_obdsd.evaluation.eval_index import Census
from dist_obdsd.evaluation.metrics import map_at_class_size, map_at_k, map_at_r, r_precision, recall_at_k
from dist_obdsd.evaluation.places import FEW, MANY, Places, count_places
from dist_obdsd.evaluation.search import Neighbours, nearest
from dist_obdsd.rng import rng

SHOWN = 16
"""Queries kept as failures, and as many as successes."""
SHOWN_NEIGHBOURS = 8
"""Neighbours kept of each."""


@dataclass(frozen=True)
class Counts:
    """What was asked of one gallery."""

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
class Answer:
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
    failures: tuple[Answer, ...]
    """The ``SHOWN`` worst queries: those whose class comes latest among the neighbours searched (or not at all); among
    equals those with the higher score of the first neighbour; then by id."""
    successes: tuple[Answer, ...]
    """The ``SHOWN`` best queries, one of a class at most: those with the most images of their class among the first
    ``SHOWN_NEIGHBOURS``; among equals in an order drawn at random, but always the same."""


def retrieve(
    gallery: str, rows_nD: torch.Tensor, place_n: torch.Tensor, census: Census, config: EvaluationConfig
) -> Retrieval:
    """Ask one gallery all queries. Collective; the same result on every rank.

    Args:
        gallery: one of ``census.galleries``.
        rows_nD: this rank's images, each image on one rank only.
        place_n: their places in the census.

    Raises:
        RunError: an embedding is not finite.
        InputError: no query has a match, or Recall@k asks for more neighbours than there are.
    """
    classes_C, class_N = census.classes
    offered_N = census.gallery_N == _number(census, gallery)
    size_N = torch.bincount(class_N[offered_N], minlength=classes_C.numel())[class_N]
    count_N = size_N - offered_N.long()  # R: gallery images of the query's class, the query itself excluded
    matched_N = census.asks_N & (count_N > 0)
    asked, matched, offered = int(census.asks_N.sum()), int(matched_N.sum()), int(offered_N.sum())
    with raise_on_all_ranks("the count of queries"):
        if not matched:
            raise InputError(
                f"none of the {asked} queries has another image of its class among the {offered} gallery images"
                f"{gallery and f' of {gallery}'}; evaluation needs classes with at least two images"
            )
    if config.conventions == "correct":
        counted_N, size_N = matched_N, count_N
    else:  # queries without a match count, too
        counted_N = census.asks_N

    needed = {"recall": max(config.recall_at), "map@1000": 1000, "map@c": int(size_N[counted_N].max())}
    needed["map@r"] = needed["r_precision"] = int(count_N[counted_N].max())
    width = max((needed[name] for name in config.metrics if name in needed), default=1)
    # Recall@k is refused where the gallery is smaller; an average precision has seen all there is.
    others = offered - bool((counted_N & offered_N).any())
    k = min(width, max(others, needed["recall"] if "recall" in config.metrics else 1))
    search = _Search(rows_nD, place_n, counted_N, offered_N, class_N, config)
    place_q = search.place_q
    places = search.places(k, count_N[place_q], quick=k <= others)
    values = _values(_widened(places.relevant_qk, count_N[place_q], width), count_N[place_q], size_N[place_q], config)
    failures, successes = _answers(gallery, search, places, census)
    return Retrieval(
        metrics=global_means(values) if values else {},
        counts=Counts(queries=int(counted_N.sum()), gallery=offered, excluded=asked - int(counted_N.sum())),
        per_class=_per_class(gallery, places.relevant_qk[:, 0], class_N[place_q], classes_C),
        failures=failures,
        successes=successes,
    )


class _Search:
    """Asks one gallery, by counting or by listing. Its methods are collective."""

    def __init__(
        self,
        rows_nD: torch.Tensor,
        place_n: torch.Tensor,
        counted_N: torch.Tensor,
        offered_N: torch.Tensor,
        class_N: torch.Tensor,
        config: EvaluationConfig,
    ) -> None:
        self.config, self.class_N, self.offered_N = config, class_N, offered_N
        is_query_n, is_offered_n = counted_N[place_n], offered_N[place_n]
        self.place_q, self.query_qD = place_n[is_query_n], rows_nD[is_query_n]
        self.offered_n, self.gallery_nD = place_n[is_offered_n], rows_nD[is_offered_n]

    def neighbours(self, some_q: torch.Tensor, k: int, scored: int) -> Neighbours:
        """The k nearest of some queries, on the CPU. A place stands for an id, and leads to the label at once."""
        found = nearest(
            self.query_qD[some_q],
            self.place_q[some_q].to(self.query_qD.device),
            self.gallery_nD,
            self.offered_n.to(self.query_qD.device),
            k,
            distance=self.config.distance,
            backend=self.config.backend,
            scored=scored,
        )
        return Neighbours(found.scores_qs.cpu(), found.ids_qk.cpu())

    def places(self, k: int, count_q: torch.Tensor, *, quick: bool) -> Places:
        """Which of the first k places have an image of the query's class, for all queries, certain for all.

        Args:
            count_q: how many images of its class a query can find.
            quick: whether counting may be tried, which takes for granted that there are k images to find.
        """
        places = Places.nothing(self.place_q.numel(), k)
        if quick and k >= MANY and self.config.backend != "faiss" and not self.query_qD.is_cuda:
            few_q = (count_q > 0) & (count_q <= FEW)
            places.put(
                few_q,
                count_places(
                    self.query_qD[few_q],
                    self.place_q[few_q],
                    self.gallery_nD,
                    self.offered_n,
                    self.class_N,
                    self.offered_N,
                    k,
                    self.config.distance,
                ),
            )
        rest_q = ~places.sure_q
        if any(collectives.gather_json(bool(rest_q.any()))):
            found = self.neighbours(rest_q, k, scored=1)
            class_N = self.class_N.int()
            relevant_rk = class_N[found.ids_qk] == class_N[self.place_q[rest_q]][:, None]
            best_r = found.scores_qs[:, 0]
            places.put(rest_q, Places(relevant_rk, best_r, torch.zeros_like(best_r), torch.ones_like(rest_q[rest_q])))
        return places


def _widened(relevant_qk: torch.Tensor, count_q: torch.Tensor, width: int) -> torch.Tensor:
    """Places beyond the end of the gallery, where there is nothing to find.

    Where some queries are gallery images and some are not, the search ended one image early for the latter; that one is
    of the query's class exactly if the class is not complete yet.
    """
    k = relevant_qk.shape[1]
    if k == width:
        return relevant_qk
    relevant_qk, found_q = nn.functional.pad(relevant_qk, (0, width - k)), relevant_qk.sum(dim=1)
    relevant_qk[:, k] = found_q < count_q
    return relevant_qk


def _values(
    relevant_qk: torch.Tensor, count_q: torch.Tensor, size_q: torch.Tensor, config: EvaluationConfig
) -> dict[str, torch.Tensor]:
    """The per-query values of the metrics that are means over queries."""
    values: dict[str, torch.Tensor] = {}
    # A query that has nothing to find and yet counts finds nothing in what is taken for a class of one.
    count_q, size_q = count_q.clamp(min=1), size_q.clamp(min=1)
    if "recall" in config.metrics:
        values |= {f"recall@{k}": value_q for k, value_q in recall_at_k(relevant_qk, config.recall_at).items()}
    if "map@r" in config.metrics:
        values["map@r"] = map_at_r(relevant_qk, count_q)
    if "r_precision" in config.metrics:
        values["r_precision"] = r_precision(relevant_qk, count_q)
    if "map@1000" in config.metrics:
        divisor_q = size_q if config.conventions == "released" else None
        values["map@1000"] = map_at_k(relevant_qk, count_q, 1000, divisor_q)
    if "map@c" in config.metrics:
        values["map@c"] = map_at_class_size(relevant_qk, size_q)
    return values


def global_means(values: dict[str, torch.Tensor]) -> dict[str, float]:
    """The means over all ranks' queries of per-query values [q] float64. Collective.

    The sum is exact and rounded once (``math.fsum``), so neither the ranks nor the order of the queries can change it.
    """
    values_QM = collectives.gather_ragged(torch.stack(list(values.values()), dim=1))
    return {
        name: math.fsum(value_Q.tolist()) / value_Q.numel() for name, value_Q in zip(values, values_QM.T, strict=True)
    }


def _number(census: Census, gallery: str) -> int:
    return census.galleries.index(gallery) if gallery in census.galleries else len(census.galleries)


def _per_class(
    gallery: str, first_q: torch.Tensor, class_q: torch.Tensor, classes_C: torch.Tensor
) -> tuple[ClassRecall, ...]:
    """Sums of ones, so exact in any order."""
    own_2C = torch.stack([torch.bincount(c, minlength=classes_C.numel()) for c in (class_q, class_q[first_q])])
    queries_C, hits_C = collectives.sum_across(own_2C).tolist()
    return tuple(
        ClassRecall(gallery, label, queries, hits / queries)
        for label, queries, hits in zip(classes_C.tolist(), queries_C, hits_C, strict=True)
        if queries
    )


def _answers(
    gallery: str, search: _Search, places: Places, census: Census
) -> tuple[tuple[Answer, ...], tuple[Answer, ...]]:
    """``Retrieval``'s failures and successes. Only queries that can be among them are asked for their neighbours."""
    place_q, k = search.place_q, places.relevant_qk.shape[1]
    first_q, bad_q = _bad(places, place_q)
    good = _good(places, place_q, census)
    good_q = torch.isin(place_q, torch.tensor(good, dtype=torch.int64))
    asked_q = bad_q | good_q
    found = search.neighbours(asked_q, min(k, SHOWN_NEIGHBOURS), scored=SHOWN_NEIGHBOURS)
    lines = [
        [-first, -scores[0], place, neighbours, scores]
        for first, place, neighbours, scores in zip(
            first_q[asked_q].tolist(),
            place_q[asked_q].tolist(),
            found.ids_qk.tolist(),
            found.scores_qs.tolist(),
            strict=True,
        )
    ]
    bad = sorted(line for line, is_bad in zip(lines, bad_q[asked_q].tolist(), strict=True) if is_bad)[:SHOWN]
    own = [bad, [line for line in lines if line[2] in good]]
    everyone = zip(*collectives.gather_json(own), strict=True)
    worst, best = (sorted(line for part in parts for line in part) for parts in everyone)
    best.sort(key=lambda line: good.index(line[2]))
    ids_N, labels_N = census.ids_N, census.labels_N
    failures, successes = (
        tuple(
            Answer(
                gallery,
                query_id=int(ids_N[place]),
                query_label=int(labels_N[place]),
                neighbour_ids=tuple(ids_N[neighbours].tolist()),
                neighbour_labels=tuple(labels_N[neighbours].tolist()),
                neighbour_scores=tuple(scores),
            )
            for _, _, place, neighbours, scores in lines
        )
        for lines in (worst[:SHOWN], best)
    )
    return failures, successes


def _bad(places: Places, place_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(the place of each query's first hit [q], whether it may be a failure [q])."""
    relevant_qk = places.relevant_qk
    # argmax finds the first of the largest, so the first hit; k where there is none.
    first_q = torch.where(relevant_qk.any(dim=1), relevant_qk.byte().argmax(dim=1), relevant_qk.shape[1])
    # The better a query's first neighbour, the worse the query, and how good it is is known up to an error.
    least_q, most_q = places.best_q - places.error_q, places.best_q + places.error_q
    order_q = place_q.argsort()
    for key_q in (least_q, first_q):
        order_q = order_q[key_q[order_q].argsort(descending=True, stable=True)]
    own = [[-int(first_q[i]), -float(least_q[i]), int(place_q[i])] for i in order_q[:SHOWN].tolist()]
    late, least, last = sorted(line for of_rank in collectives.gather_json(own) for line in of_rank)[:SHOWN][-1]
    as_good_q = (most_q > -least) | ((most_q == -least) & (place_q <= last))
    return first_q, (first_q > -late) | ((first_q == -late) & as_good_q)


def _good(places: Places, place_q: torch.Tensor, census: Census) -> list[int]:
    """The places of the successes, the best first. A class's best query is among the best of its own rank."""
    right_q = places.relevant_qk[:, :SHOWN_NEIGHBOURS].sum(dim=1)
    drawn_q = torch.from_numpy(rng(0, "best queries").permutation(len(census)))[place_q]
    order_q = drawn_q.argsort()
    order_q = order_q[right_q[order_q].argsort(descending=True, stable=True)]
    class_q = census.classes[1][place_q]
    own: dict[int, list[int]] = {}
    for i in order_q.tolist():
        own.setdefault(int(class_q[i]), [-int(right_q[i]), int(drawn_q[i]), int(place_q[i])])
        if len(own) == SHOWN:
            break
    best: dict[int, int] = {}
    everyone = [item for of_rank in collectives.gather_json(list(own.items())) for item in of_rank]
    for of_class, line in sorted(everyone, key=itemgetter(1)):
        best.setdefault(of_class, line[2])
    return list(best.values())[:SHOWN]
