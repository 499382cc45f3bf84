"""Retrieval metrics: from a ranked search to one value **per query**.

A metric is a function that makes a ``QueryMetric``; its arguments are keywords, those of ``recall_at`` and ``released``
that it needs. ``config/registry.py`` names it. ``retrieval`` takes the mean over all ranks' queries, leaves out and
counts those that have nothing to find, and searches for as many neighbours as the metrics look at.

Shapes: q queries of this rank, k neighbours, best first; h hits. ``R`` is the number of gallery images of a query's
class, the query itself excluded, and ``relevant_i`` is 1 if the i-th neighbour is of its class.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class QueryMetric:
    """A metric that has one value per query; the mean over the queries is reported."""

    values: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]
    """(relevant [q, k] bool, R [q], class size [q]) -> printed name -> [q] float64 in [0, 1]. The class size is R, or
    by the released conventions includes the query. Both are at least 1."""
    neighbours: Callable[[int, int], int]
    """(largest R, largest class size) -> neighbours that it needs."""
    refuses_less: bool = False
    """Whether a gallery with fewer images is an error. An average precision has seen all there is."""


def recall(*, recall_at: Sequence[int]) -> QueryMetric:
    """Recall@k: an image of the query's class is among the k nearest (Jegou, 2011).

    ``Recall@k(query) = 1 if any(relevant_1 .. relevant_k) else 0``
    (Jegou et al., Product quantization for nearest neighbor search, 2011; Song et al., Deep metric learning via lifted
    structured feature embedding, CVPR 2016).

    The first query finds its class at place 2, the second nowhere:

    >>> relevant = torch.tensor([[False, True, True, False], [False, False, False, False]])
    >>> found = recall(recall_at=(1, 2, 4)).values(relevant, torch.tensor([2, 1]), torch.tensor([2, 1]))
    >>> {name: values.tolist() for name, values in found.items()}
    {'recall@1': [0.0, 0.0], 'recall@2': [1.0, 0.0], 'recall@4': [1.0, 0.0]}
    """
    return QueryMetric(
        lambda relevant_qk, r_q, size_q: {f"recall@{k}": relevant_qk[:, :k].any(dim=1).double() for k in recall_at},
        lambda r, size: max(recall_at),
        refuses_less=True,
    )


def map_at_r() -> QueryMetric:
    """Mean average precision over as many places as images to find (Musgrave, 2020).

    ``MAP@R(query) = 1/R sum_{i=1..R} P(i) relevant_i`` with ``P(i) = (relevant_1 + .. + relevant_i) / i`` rewards a
    class that stands together at the front (Musgrave, Belongie, Lim, A metric learning reality check, ECCV 2020).

    R = 3 and the class stands at places 1 and 3, so (1/1 + 2/3) / 3; the second query has R = 1 and misses place 1:

    >>> relevant = torch.tensor([[True, False, True, True], [False, True, False, False]])
    >>> found = map_at_r().values(relevant, torch.tensor([3, 1]), torch.tensor([3, 1]))
    >>> [round(value, 6) for value in found["map@r"].tolist()]
    [0.555556, 0.0]
    """
    return QueryMetric(
        lambda relevant_qk, r_q, size_q: {"map@r": _precision_sums(relevant_qk, r_q) / r_q}, lambda r, size: r
    )


def map_at_class_size() -> QueryMetric:
    """The authors' mAP_c: average precision over the class's size; else `map@r`."""
    # In file metrics/mAP_c.py of github.com/Confusezius/Revisiting_Deep_Metric_Learning_PyTorch the class includes the
    # query, so that even a perfect ranking reaches only (c - 1) / c.
    return QueryMetric(
        lambda relevant_qk, r_q, size_q: {"map@c": _precision_sums(relevant_qk, size_q) / size_q},
        lambda r, size: size,
    )


def map_at_1000(*, released: bool, k: int = 1000) -> QueryMetric:
    """Mean average precision over the first 1,000 places (Weyand et al., CVPR 2020).

    ``mAP@k(query) = 1/min(R, k) sum_{i=1..k} P(i) relevant_i`` with P as in ``map_at_r`` (Weyand et al., Google
    Landmarks Dataset v2, CVPR 2020, equation 3, there with k = 100). Unlike MAP@R it also rewards what stands behind
    place R. The released code divides by the class size, the query included.

    R = 2 and the class stands at places 2 and 4, so (1/2 + 2/4) / 2; R = 3 beyond k = 4 with places 1 and 2, so
    (1 + 1) / 3; R = 9 is more than k can show, and k is full; a class that is not found:

    >>> relevant = torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    >>> R = torch.tensor([2, 3, 9, 1])
    >>> [round(value, 6) for value in map_at_1000(released=False, k=4).values(relevant, R, R)["map@4"].tolist()]
    [0.5, 0.666667, 1.0, 0.0]
    """

    def values(relevant_qk: torch.Tensor, r_q: torch.Tensor, size_q: torch.Tensor) -> dict[str, torch.Tensor]:
        divisor_q = size_q if released else r_q.clamp(max=k)
        return {f"map@{k}": _precision_sums(relevant_qk, torch.full_like(r_q, k)) / divisor_q}

    return QueryMetric(values, lambda r, size: k)


def r_precision() -> QueryMetric:
    """Share of the query's class among the first R places (Manning, section 8.4).

    ``R-precision(query) = 1/R sum_{i=1..R} relevant_i`` (Manning, Raghavan, Schuetze, Introduction to Information
    Retrieval, section 8.4; for metric learning Musgrave, Belongie, Lim, ECCV 2020).

    R = 3 with places 1 and 3, R = 1 with place 2, and R = 2 with nothing:

    >>> relevant = torch.tensor([[True, False, True], [False, True, False], [False, False, True]])
    >>> found = r_precision().values(relevant, torch.tensor([3, 1, 2]), torch.tensor([3, 1, 2]))
    >>> [round(value, 6) for value in found["r_precision"].tolist()]
    [0.666667, 0.0, 0.0]
    """

    def values(relevant_qk: torch.Tensor, r_q: torch.Tensor, size_q: torch.Tensor) -> dict[str, torch.Tensor]:
        place_k = torch.arange(relevant_qk.shape[1], device=relevant_qk.device)
        return {"r_precision": (relevant_qk & (place_k < r_q[:, None])).sum(dim=1).double() / r_q}

    return QueryMetric(values, lambda r, size: r)


def _precision_sums(relevant_qk: torch.Tensor, limit_q: torch.Tensor) -> torch.Tensor:
    """``sum_{i=1..limit} P(i) relevant_i`` of each query. [q] float64.

    Only the relevant places add to it, and there are few: the j-th of them, at place i, adds j / i. In order of j, one
    at a time, a query's value has the same bits in whatever batch it stands.
    """
    query_h, place_h = relevant_qk.nonzero(as_tuple=True)  # by query, then place
    counts = place_h < limit_q[query_h]
    query_h, place_h = query_h[counts], place_h[counts].double()
    hits_q = torch.bincount(query_h, minlength=relevant_qk.shape[0])
    first_q = hits_q.cumsum(0) - hits_q
    total_q = torch.zeros(relevant_qk.shape[0], dtype=torch.float64, device=relevant_qk.device)
    for j in range(int(hits_q.max()) if hits_q.numel() else 0):
        has = (hits_q > j).nonzero().flatten()
        # Not (j + 1) / place, which torch computes as a product with the reciprocal.
        place = place_h[first_q[has] + j] + 1.0
        total_q[has] += torch.full_like(place, j + 1) / place
    return total_q
