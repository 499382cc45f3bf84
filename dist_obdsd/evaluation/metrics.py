"""Retrieval metrics: from a ranked search to one value **per query**.

The mean over all ranks' queries is taken by the evaluator, which also leaves out, and counts, the queries that have
nothing to find; a metric never shrinks its denominator by itself.

Shapes: q queries, k neighbours, best first.
"""

from collections.abc import Sequence

import torch

from dist_obdsd.errors import InputError


def recall_at_k(relevant_qk: torch.Tensor, ks: Sequence[int]) -> dict[int, torch.Tensor]:
    """Compute Recall@K: an image of the query's class is among the K nearest.

    ``Recall@K(query) = 1 if any(relevant_1 .. relevant_K) else 0``
    (Jegou et al., Product quantization for nearest neighbor search, 2011; Song et al., Deep metric learning via lifted
    structured feature embedding, CVPR 2016).

    Args:
        relevant_qk: [q, k] bool; entry i is True where the i-th neighbour is of the query's class.
        ks: the values of K, each at most k.

    Returns:
        K -> [q] float64 of zeros and ones.

    Raises:
        InputError: a K is below 1 or above the number of neighbours.

    The first query finds its class at place 2, the second nowhere:

    >>> relevant = torch.tensor([[False, True, True, False], [False, False, False, False]])
    >>> {k: values.tolist() for k, values in recall_at_k(relevant, (1, 2, 4)).items()}
    {1: [0.0, 0.0], 2: [1.0, 0.0], 4: [1.0, 0.0]}
    """
    width = relevant_qk.shape[1]
    for k in ks:
        if not 1 <= k <= width:
            raise InputError(f"Recall@{k} needs a k of 1 to {width}, the number of neighbours; search for {k} or more")
    return {k: relevant_qk[:, :k].any(dim=1).double() for k in ks}


def map_at_r(relevant_qk: torch.Tensor, relevant_count_q: torch.Tensor) -> torch.Tensor:
    """Compute MAP@R: it rewards a class that stands together at the front.

    ``MAP@R(query) = 1/R sum_{i=1..R} P(i) relevant_i`` with ``P(i) = (relevant_1 + .. + relevant_i) / i``, and R the
    number of gallery images of the query's class, the query itself excluded (Musgrave, Belongie, Lim, A metric learning
    reality check, ECCV 2020).

    Args:
        relevant_qk: [q, k] bool; entry i is True where the i-th neighbour is of the query's class.
        relevant_count_q: [q] int, R of each query; at least 1 and at most k.

    Returns:
        [q] float64 in [0, 1].

    Raises:
        InputError: k is below the largest R, or an R is 0.

    R = 3 and the class stands at places 1 and 3, so (1/1 + 2/3) / 3; the second query has R = 1 and misses place 1:

    >>> relevant = torch.tensor([[True, False, True, True], [False, True, False, False]])
    >>> [round(value, 6) for value in map_at_r(relevant, torch.tensor([3, 1])).tolist()]
    [0.555556, 0.0]
    """
    _check("MAP@R", relevant_qk, relevant_count_q, relevant_count_q)
    return _precision_sums(relevant_qk, relevant_count_q) / relevant_count_q


def r_precision(relevant_qk: torch.Tensor, relevant_count_q: torch.Tensor) -> torch.Tensor:
    """R-precision: the share of the query's class among the first R.

    ``R-precision(query) = 1/R sum_{i=1..R} relevant_i``, R the number of gallery images of the query's class, the query
    itself excluded (Manning, Raghavan, Schuetze, Introduction to Information Retrieval, section 8.4; for metric
    learning Musgrave, Belongie, Lim, ECCV 2020).

    Args, Raises:
        As in ``map_at_r``.

    Returns:
        [q] float64 in [0, 1].

    R = 3 with places 1 and 3, R = 1 with place 2, and R = 2 with nothing:

    >>> relevant = torch.tensor([[True, False, True], [False, True, False], [False, False, True]])
    >>> [round(value, 6) for value in r_precision(relevant, torch.tensor([3, 1, 2])).tolist()]
    [0.666667, 0.0, 0.0]
    """
    _check("R-precision", relevant_qk, relevant_count_q, relevant_count_q)
    place_k = torch.arange(relevant_qk.shape[1], device=relevant_qk.device)
    return (relevant_qk & (place_k < relevant_count_q[:, None])).sum(dim=1).double() / relevant_count_q


def map_at_k(
    relevant_qk: torch.Tensor, relevant_count_q: torch.Tensor, k: int, divisor_q: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute mAP@k, with k = 1000 in the released code, over the first k places.

    ``mAP@k(query) = 1/min(R, k) sum_{i=1..k} P(i) relevant_i`` with P and R as in ``map_at_r`` (Weyand et al., Google
    Landmarks Dataset v2, CVPR 2020, equation 3, there with k = 100). Unlike MAP@R it also rewards what stands behind
    place R.

    Args:
        relevant_qk: [q, width] bool, width at least k.
        relevant_count_q: [q] int, R of each query; at least 1.
        k: places looked at.
        divisor_q: [q] instead of min(R, k); the released code divides by the class size, the query included.

    Returns:
        [q] float64 in [0, 1].

    Raises:
        InputError: the width is below k, or an R is 0.

    R = 2 and the class stands at places 2 and 4, so (1/2 + 2/4) / 2; R = 3 beyond k = 4 with places 1 and 2, so
    (1 + 1) / 3; R = 9 is more than k can show, and k is full; a class that is not found:

    >>> relevant = torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    >>> [round(value, 6) for value in map_at_k(relevant, torch.tensor([2, 3, 9, 1]), 4).tolist()]
    [0.5, 0.666667, 1.0, 0.0]
    """
    limit_q = torch.full_like(relevant_count_q, k)
    _check(f"mAP@{k}", relevant_qk, relevant_count_q, limit_q)
    divisor_q = relevant_count_q.clamp(max=k) if divisor_q is None else divisor_q
    return _precision_sums(relevant_qk, limit_q) / divisor_q


def _check(name: str, relevant_qk: torch.Tensor, relevant_count_q: torch.Tensor, limit_q: torch.Tensor) -> None:
    width, needed = relevant_qk.shape[1], int(limit_q.max()) if limit_q.numel() else 0
    if needed > width:
        raise InputError(f"{name} needs {needed} neighbours, but {width} were searched; search for more")
    if (relevant_count_q < 1).any():
        raise InputError(
            f"{name} is undefined for {int((relevant_count_q < 1).sum())} queries without a match; leave them out first"
        )


def _precision_sums(relevant_qk: torch.Tensor, limit_q: torch.Tensor) -> torch.Tensor:
    """``sum_{i=1..limit} P(i) relevant_i`` of each query. [q] float64.

    Only the relevant places add to it, and there are few: the j-th of them, at place i, adds j / i. In order of j, one
    at a time, a query's value has the same bits in whatever batch it stands.
    """
    query_h, place_h = relevant_qk.nonzero(as_tuple=True)  # the hits, by query, then place
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
