"""Retrieval metrics. Pure: each takes what a ranked search found and returns one value **per query**.

The mean over all ranks' queries is taken by the evaluator, which also leaves out, and counts, the queries that have
nothing to find; a metric never shrinks its denominator by itself.

Shapes: q queries, k neighbours, best first.
"""

from collections.abc import Sequence

import torch

from dist_obdsd.errors import InputError


def recall_at_k(relevant_qk: torch.Tensor, ks: Sequence[int]) -> dict[int, torch.Tensor]:
    """Recall@K as metric learning uses the name: is an image of the query's class among the K nearest?

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
    """MAP@R, the mean average precision at R: rewards a query's class standing together at the front.

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
    width, needed = relevant_qk.shape[1], int(relevant_count_q.max()) if relevant_count_q.numel() else 0
    if needed > width:
        raise InputError(f"MAP@R needs {needed} neighbours, the largest R, but {width} were searched; search for more")
    if (relevant_count_q < 1).any():
        raise InputError(
            f"MAP@R is undefined for {int((relevant_count_q < 1).sum())} queries without a match; leave them out first"
        )
    total_q = torch.zeros(relevant_qk.shape[0], dtype=torch.float64, device=relevant_qk.device)
    hits_q = torch.zeros_like(total_q)
    # In order of i, one place at a time: a query's value then has the same bits in whatever batch it stands.
    for i in range(1, needed + 1):
        relevant_q = relevant_qk[:, i - 1] & (relevant_count_q >= i)
        hits_q += relevant_q
        total_q += relevant_q * (hits_q / i)
    return total_q / relevant_count_q
