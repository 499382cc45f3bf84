"""Clustering: k-means over all ranks with the same bits on any number of them, and what a clustering is worth.

Assignments follow one float64 score that is summed in a fixed order, ties going to the first centre; a matrix product
only says which centres can be meant. Centres are means of exact sums (``exact``). Seeds are drawn from the ids.

Shapes: n images of this rank, N of all ranks, k clusters, D embedding dimension; u rows in doubt, p pairs of a row and
a centre.
"""

import math
from collections import Counter
from dataclasses import dataclass

import torch

from dist_obdsd.distributed import collectives
from dist_obdsd.distributed.failures import raise_on_all_ranks
from dist_obdsd.errors import InputError
from dist_obdsd.evaluation.exact import group_means
from dist_obdsd.rng import rng

ITERATIONS = 20  # as the released code has it
CELLS = 1 << 21  # scores held at a time

Table = dict[tuple[int, int], int]
"""A contingency table without its zeros: (class, cluster) -> images."""


@dataclass(frozen=True)
class Clusters:
    cluster_n: torch.Tensor
    """int64: the cluster of each of this rank's images."""
    centres_kD: torch.Tensor
    """float64; the same on every rank."""


def k_means(rows_nD: torch.Tensor, ids_n: torch.Tensor, k: int, *, seed: int, iterations: int = ITERATIONS) -> Clusters:
    """Lloyd's k-means (Lloyd, Least squares quantization in PCM, 1982) of all ranks' rows. Collective.

    Starts from k images drawn without replacement, by ``seeds.rng`` from the ids, as faiss does and so the released
    code; clusters are numbered by their start's id. A cluster that ends up empty is given the image farthest from its
    own centre (ties: the smaller id); it stays empty where every image lies on its centre. Stops when no image changes
    its cluster, at the latest after ``iterations`` updates. The same bits for any number of ranks and any distribution
    of the images.

    Args:
        rows_nD: float32 or float64, finite.
        ids_n: int64, unique over all ranks.
        k: clusters, at most N.

    Raises:
        InputError: on every rank: k is below 1 or above N.
    """
    ids_N = collectives.gather_ragged(ids_n).sort().values
    with raise_on_all_ranks("k-means"):
        if not 1 <= k <= ids_N.numel():
            raise InputError(f"k-means into {k} clusters needs at least as many images, but there are {ids_N.numel()}")
    drawn = torch.from_numpy(rng(seed, "k-means").permutation(ids_N.numel())[:k]).to(ids_N.device)
    own_n = torch.isin(ids_n, ids_N[drawn])
    seed_ids_k, seeds_kD = collectives.gather_ragged(ids_n[own_n]), collectives.gather_ragged(rows_nD[own_n])
    centres_kD = seeds_kD[seed_ids_k.argsort()].double()

    norm_n = _norms(rows_nD)
    cluster_n = nearest_centre(rows_nD, centres_kD, norm_n)
    for _ in range(iterations):
        before_kD, before_n = centres_kD, cluster_n
        centres_kD, sizes_k = group_means(rows_nD, cluster_n, k)
        _fill_empty(centres_kD, sizes_k, rows_nD, ids_n, cluster_n)
        cluster_n = _nearest_again(rows_nD, norm_n, centres_kD, before_kD, before_n)
        if not int(collectives.sum_across((cluster_n != before_n).sum())):
            break
    return Clusters(cluster_n, centres_kD)


def nearest_centre(rows_nD: torch.Tensor, centres_kD: torch.Tensor, norm_n: torch.Tensor | None = None) -> torch.Tensor:
    """The nearest centre of each row in Euclidean distance, ties to the first; [n] int64.

    |x - c|^2 is smallest where s = x.c - |c|^2/2 is largest. A row whose two best scores lie closer than the rounding
    error of the matrix product is scored again, first in float64, then in a fixed order (``_pair_sum``).

    Args:
        norm_n: ``_norms`` of the rows, where they are known.
    """
    norm_n = _norms(rows_nD) if norm_n is None else norm_n
    # Equal centres would be a tie for every row: only the first of each is asked.
    distinct_kD, group_k = centres_kD.unique(dim=0, return_inverse=True)
    first_k = torch.full((distinct_kD.shape[0],), group_k.numel(), device=group_k.device)
    first_k = first_k.scatter_reduce(0, group_k, torch.arange(group_k.numel(), device=group_k.device), "amin")
    first_k, _ = first_k.sort()
    centres_kD = centres_kD[first_k]
    half_k = _pair_sum(centres_kD, centres_kD) / 2
    nearest_n = torch.empty(rows_nD.shape[0], dtype=torch.int64, device=rows_nD.device)
    rough = [
        (centres_kD.to(kind).T.contiguous(), half_k.to(kind), _error_bound(norm_n, centres_kD, kind))
        for kind in (torch.float32, torch.float64)
    ]
    for place_m in torch.arange(rows_nD.shape[0], device=rows_nD.device).split(max(1, CELLS // first_k.numel())):
        unsure_u = place_m
        for rough_Dk, rough_half_k, error_n in rough:
            rows_uD, error_u = rows_nD[unsure_u], error_n[unsure_u]
            rough_uk = (rows_uD.to(rough_Dk.dtype) @ rough_Dk).sub_(rough_half_k)
            # NumPy's argmax is many times as quick as torch's on a CPU with AVX.
            centre_u = rough_uk.argmax(dim=1) if rough_uk.is_cuda else torch.from_numpy(rough_uk.numpy().argmax(axis=1))
            best_u = rough_uk.gather(1, centre_u[:, None])[:, 0]
            second_u = rough_uk.scatter_(1, centre_u[:, None], -torch.inf).amax(dim=1)
            rough_uk.scatter_(1, centre_u[:, None], best_u[:, None])
            sure_u = second_u.double() < best_u.double() - 2 * error_u
            # A library told to use TF32 or bfloat16 breaks the bound, and shows it on any few scores.
            few = slice(0, 64)
            exact_u = _pair_sum(rows_uD[few].double(), centres_kD[centre_u[few]]) - half_k[centre_u[few]]
            sure_u &= ((best_u[few].double() - exact_u).abs() <= error_u[few]).all()
            nearest_n[unsure_u[sure_u]] = centre_u[sure_u]
            floor_u, unsure_u = (best_u.double() - 2 * error_u)[~sure_u], unsure_u[~sure_u]
            if not unsure_u.numel():
                break
        if unsure_u.numel():
            row_p, centre_p = (rough_uk[~sure_u].double() >= floor_u[:, None]).nonzero(as_tuple=True)
            score_p = _pair_sum(rows_nD[unsure_u[row_p]].double(), centres_kD[centre_p]) - half_k[centre_p]
            nearest_n[unsure_u] = _first_best(row_p, centre_p, score_p, unsure_u.numel())
    return first_k[nearest_n]


def _nearest_again(
    rows_nD: torch.Tensor,
    norm_n: torch.Tensor,
    centres_kD: torch.Tensor,
    before_kD: torch.Tensor,
    before_n: torch.Tensor,
) -> torch.Tensor:
    """``nearest_centre``, given that ``before_n`` was nearest among the centres ``before_kD``, of which many stayed.

    A row whose centre stayed need only be compared with those that moved.
    """
    moved_k = (centres_kD != before_kD).any(dim=1)
    nearest_n = before_n.clone()
    lost_n = moved_k[before_n]
    nearest_n[lost_n] = nearest_centre(rows_nD[lost_n], centres_kD, norm_n[lost_n])
    if moved_k.any():
        kept_m, mover_k = (~lost_n).nonzero().flatten(), moved_k.nonzero().flatten()
        rows_mD, own_m = rows_nD[kept_m], before_n[kept_m]
        rival_m = mover_k[nearest_centre(rows_mD, centres_kD[mover_k], norm_n[kept_m])]
        half_k, rough_kD = _pair_sum(centres_kD, centres_kD) / 2, centres_kD.to(rows_nD.dtype)
        lead_m = (rows_mD * rough_kD[rival_m]).sum(1).double() - (rows_mD * rough_kD[own_m]).sum(1).double()
        lead_m += half_k[own_m] - half_k[rival_m]
        # Where rounding could turn the sign, the score that decides is computed. `not >` also catches an overflow.
        close_m = ~(lead_m.abs() > 2 * _error_bound(norm_n[kept_m], centres_kD, rows_nD.dtype))
        rows_uD = rows_mD[close_m].double()
        own_u, rival_u = (_pair_sum(rows_uD, centres_kD[c]) - half_k[c] for c in (own_m[close_m], rival_m[close_m]))
        lead_m[close_m] = torch.where(rival_u == own_u, (own_m - rival_m)[close_m].double(), rival_u - own_u)
        nearest_n[kept_m[lead_m > 0]] = rival_m[lead_m > 0]
    return nearest_n


def contingency(class_n: torch.Tensor, cluster_n: torch.Tensor) -> Table:
    """How many images of all ranks each pair (class, cluster) has. Collective; the same on every rank."""
    pairs, counts = torch.stack([class_n, cluster_n], dim=1).unique(dim=0, return_counts=True)
    table: Table = Counter()
    for of_class, of_cluster, count in collectives.gather_ragged(torch.cat([pairs, counts[:, None]], 1)).tolist():
        table[of_class, of_cluster] += count
    return dict(sorted(table.items()))


def nmi(table: Table) -> float:
    """Normalised mutual information of classes and clusters.

    ``NMI = 2 I(class; cluster) / (H(class) + H(cluster))`` (Manning, Raghavan, Schuetze, Introduction to Information
    Retrieval, section 16.3; the arithmetic mean, as scikit-learn's default). 1 where both are one single group; 0 where
    the clusters say nothing of the classes.

    Two classes of two images. Clustered perfectly, all in one cluster, and with one image astray:

    >>> nmi({(0, 5): 2, (1, 3): 2}), nmi({(0, 0): 2, (1, 0): 2}), round(nmi({(0, 0): 2, (1, 0): 1, (1, 1): 1}), 6)
    (1.0, 0.0, 0.343711)
    """
    classes, clusters, total = _margins(table)
    if len(classes) == len(clusters) == 1:
        return 1.0
    mutual = math.fsum(
        n / total * math.log(n * total / (classes[of_class] * clusters[of_cluster]))
        for (of_class, of_cluster), n in table.items()
    )
    entropy = math.fsum(-n / total * math.log(n / total) for margin in (classes, clusters) for n in margin.values())
    return min(1.0, max(0.0, 2 * mutual / entropy))


def pairwise_f1(table: Table) -> float:
    """F1 of "these two images are of one class", said of every pair that shares a cluster.

    ``F1 = 2 P R / (P + R)``, P the share of the pairs within clusters that are of one class, R the share of the pairs
    within classes that share a cluster (Song et al., Deep metric learning via lifted structured feature embedding, CVPR
    2016). 1 where there is no pair to find and none is claimed.

    Perfect; all in one cluster, so P = 2/6 and R = 1; one image astray, so P = 1/3 and R = 1/2; nothing to find:

    >>> pairwise_f1({(0, 5): 2, (1, 3): 2}), pairwise_f1({(0, 0): 2, (1, 0): 2})
    (1.0, 0.5)
    >>> pairwise_f1({(0, 0): 2, (1, 0): 1, (1, 1): 1}), pairwise_f1({(0, 0): 1, (1, 1): 1})
    (0.4, 1.0)
    """
    classes, clusters, _ = _margins(table)
    right, of_class, of_cluster = (
        sum(n * (n - 1) // 2 for n in counts.values()) for counts in (table, classes, clusters)
    )
    return 2 * right / (of_class + of_cluster) if of_class + of_cluster else 1.0


def _margins(table: Table) -> tuple[Counter[int], Counter[int], int]:
    classes: Counter[int] = Counter()
    clusters: Counter[int] = Counter()
    for (of_class, of_cluster), n in table.items():
        classes[of_class] += n
        clusters[of_cluster] += n
    return classes, clusters, sum(table.values())


def _fill_empty(
    centres_kD: torch.Tensor, sizes_k: torch.Tensor, rows_nD: torch.Tensor, ids_n: torch.Tensor, cluster_n: torch.Tensor
) -> None:
    """Put the farthest images, in order, into the places of empty clusters' centres, in place. Collective."""
    empty = (sizes_k == 0).nonzero().flatten()
    if not empty.numel():
        return
    difference_nD = rows_nD.double() - centres_kD[cluster_n]
    distance_n = _pair_sum(difference_nD, difference_nD)
    order_n = ids_n.argsort()
    order_n = order_n[distance_n[order_n].argsort(descending=True, stable=True)]
    order_n = order_n[distance_n[order_n] > 0][: empty.numel()]
    far_N, ids_N, rows_ND = (collectives.gather_ragged(x[order_n]) for x in (distance_n, ids_n, rows_nD))
    order_N = ids_N.argsort()
    order_N = order_N[far_N[order_N].argsort(descending=True, stable=True)][: empty.numel()]
    centres_kD[empty[: order_N.numel()]] = rows_ND[order_N].double()


def _pair_sum(x_pD: torch.Tensor, y_pD: torch.Tensor) -> torch.Tensor:
    """sum_d x_d y_d of each pair of rows, in the order of d: its bits depend on the two rows alone. [p] float64."""
    total_p = x_pD.new_zeros(x_pD.shape[0], dtype=torch.float64)
    for x_p, y_p in zip(x_pD.T.contiguous(), y_pD.T.contiguous(), strict=True):
        total_p += x_p * y_p
    return total_p


def _norms(rows_nD: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(rows_nD, dim=1, dtype=torch.float64)


def _error_bound(norm_u: torch.Tensor, centres_kD: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """How far a score x.c - |c|^2/2 computed in ``kind``, in any order, may lie from that of ``_pair_sum``. [u].

    |fl(x.c) - x.c| <= g |x| |c|, g = m u / (1 - m u) with m = D + 4 (Higham, Accuracy and Stability of Numerical
    Algorithms, section 3.1; the 4 for rounding the inputs and these norms); 4 u for the subtraction.
    """
    largest = centres_kD.norm(dim=1).max()
    m = centres_kD.shape[1] + 4
    relative = sum(
        m * unit / (1 - m * unit) + 4 * unit for unit in (torch.finfo(kind).eps / 2, torch.finfo(torch.float64).eps / 2)
    )
    underflow = 8 * m * torch.finfo(kind).tiny * (1 + norm_u) * (1 + largest)
    return relative * (norm_u * largest + largest * largest) + underflow


def _first_best(row_p: torch.Tensor, centre_p: torch.Tensor, score_p: torch.Tensor, rows: int) -> torch.Tensor:
    """For each row the first of its centres with the largest score; the pairs come sorted by row, then centre."""
    best_u = score_p.new_full((rows,), -torch.inf).scatter_reduce(0, row_p, score_p, "amax")
    centre_p = torch.where(score_p == best_u[row_p], centre_p, torch.iinfo(torch.int64).max)
    return torch.full((rows,), torch.iinfo(torch.int64).max, device=row_p.device).scatter_reduce(
        0, row_p, centre_p, "amin"
    )
