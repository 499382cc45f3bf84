"""k-means over all ranks, and how well a clustering agrees with the classes.

Rows are assigned and centres summed by blocks of rows in id order (``row_blocks``). Where a row's two best centres lie
closer than the rounding of float32, float64 scores in a fixed order decide, ties going to the first centre. So the
clusters are the same for any number of ranks and threads.

Shapes: r rows of a block, N of all ranks, k clusters, D embedding dimension; u rows whose centres lie close.
"""

import numpy as np
import torch

from dist_obdsd.distributed import collectives
from dist_obdsd.distributed.failures import raise_on_all_ranks
from dist_obdsd.errors import InputError
from dist_obdsd.evaluation.knn import ROUNDING, fixed_sum
from dist_obdsd.evaluation.row_blocks import RowBlocks
from dist_obdsd.rng import rng

ITERATIONS = 20
"""Updates of the centres at most, as the released code has it."""
CELLS = 1 << 21
"""Scores held at a time."""


def k_means(blocks: RowBlocks, k: int, *, seed: int, iterations: int = ITERATIONS) -> tuple[torch.Tensor, torch.Tensor]:
    """Cluster all ranks' rows by Lloyd's k-means (Least squares quantization in PCM, 1982). Collective.

    It starts from k rows drawn without replacement, as faiss does and so the released code; clusters are numbered by
    their start's id. A cluster that ends up empty is given the row farthest from its own centre (ties: the smaller id).
    It stays empty where every row lies on its centre. The iterations end when no row changes its cluster.

    Args:
        blocks: finite rows.
        k: clusters, at most N.

    Returns:
        (each row's cluster [N] int64 by ascending id, centres [k, D] float64), the same on every rank.

    Raises:
        InputError: on every rank: k is below 1 or above N.
    """
    with raise_on_all_ranks("k-means"):
        if not 1 <= k <= blocks.N:
            raise InputError(f"k-means into {k} clusters needs at least as many images, but there are {blocks.N}")
    start_k = torch.from_numpy(np.sort(rng(seed, "k-means").permutation(blocks.N)[:k]))
    centres_kD = _rows_at(blocks, start_k)
    clusters = {number: nearest_centre(rows_rD, centres_kD) for number, rows_rD in blocks.own.items()}
    for _ in range(iterations):
        before = clusters
        centres_kD = _means(blocks, clusters, k)
        clusters = {number: nearest_centre(rows_rD, centres_kD) for number, rows_rD in blocks.own.items()}
        changed = any(not torch.equal(clusters[number], before[number]) for number in clusters)
        if not any(collectives.gather_json(changed)):
            break
    return blocks.gather(clusters).long(), centres_kD


def _rows_at(blocks: RowBlocks, place_k: torch.Tensor) -> torch.Tensor:
    """The rows at some places, float64 [k, D], on every rank. Collective."""

    def own(number: int, rows_rD: torch.Tensor) -> torch.Tensor:
        found_kD = torch.zeros(len(place_k), blocks.D, dtype=torch.float64, device=blocks.device)
        inside_k = place_k // blocks.size == number
        found_kD[inside_k.to(blocks.device)] = rows_rD[(place_k[inside_k] % blocks.size).to(blocks.device)].double()
        return found_kD

    return blocks.sum(own, (len(place_k), blocks.D))


def _means(blocks: RowBlocks, clusters: dict[int, torch.Tensor], k: int) -> torch.Tensor:
    """The clusters' means [k, D] float64; empty clusters get the farthest rows. Collective."""
    sums_kD = blocks.sum(lambda number, rows_rD: group_sums(rows_rD, clusters[number], k), (k, blocks.D))
    sizes_k = blocks.sum(lambda number, _: torch.bincount(clusters[number], minlength=k).double(), (k,))
    means_kD = sums_kD / sizes_k.clamp(min=1)[:, None]
    empty_e = (sizes_k == 0).nonzero().flatten()
    if len(empty_e):
        distance_N = blocks.gather(
            {n: fixed_sum((rows.double() - means_kD[clusters[n]]).square()) for n, rows in blocks.own.items()}
        )
        far_e = distance_N.argsort(descending=True, stable=True)[: len(empty_e)]
        far_e = far_e[distance_N[far_e] > 0]
        means_kD[empty_e[: len(far_e)]] = _rows_at(blocks, far_e.cpu())
    return means_kD


def group_sums(rows_rD: torch.Tensor, group_r: torch.Tensor, k: int) -> torch.Tensor:
    """Sum the rows of each group 0..k-1 in their order: float64 [k, D]."""
    sums_kD = np.zeros((k, rows_rD.shape[1]))
    if len(rows_rD):
        order_r = group_r.argsort(stable=True)
        groups, starts = np.unique(group_r[order_r].cpu().numpy(), return_index=True)
        sums_kD[groups] = np.add.reduceat(rows_rD[order_r].double().cpu().numpy(), starts, axis=0)
    return torch.from_numpy(sums_kD).to(rows_rD.device)


def nearest_centre(rows_rD: torch.Tensor, centres_kD: torch.Tensor) -> torch.Tensor:
    """Find the nearest centre of each row by Euclidean distance, ties to the first: [r] int64.

    |x - c|^2 is smallest where s = x.c - |c|^2/2 is largest.

    Args:
        centres_kD: float64.
    """
    # Equal centres would be a tie for every row, so only the first of each is asked.
    distinct, group_k = np.unique(centres_kD.cpu().numpy(), axis=0, return_inverse=True)
    first = np.full(len(distinct), len(centres_kD))
    np.minimum.at(first, group_k.reshape(-1), np.arange(len(centres_kD)))
    first_k = torch.from_numpy(np.sort(first)).to(rows_rD.device)
    centres_kD = centres_kD[first_k]
    half_k = fixed_sum(centres_kD.square()) / 2
    rough_Dk, rough_half_k = centres_kD.T.float().contiguous(), half_k.float()
    longest = float(half_k.max().mul(2).sqrt())
    nearest = [torch.empty(0, dtype=torch.int64, device=rows_rD.device)]
    for rows_mD in rows_rD.split(max(1, CELLS // len(first_k))):
        scores_mk = rows_mD.float() @ rough_Dk - rough_half_k
        best_m2, centre_m2 = scores_mk.topk(min(2, len(first_k)), dim=1)
        close_m = ROUNDING * (rows_mD.double().norm(dim=1) + longest) ** 2
        tied_m = ~(best_m2[:, 0].double() - best_m2[:, -1].double() > close_m)
        nearest_m = centre_m2[:, 0].clone()
        if len(first_k) > 1 and tied_m.any():
            nearest_m[tied_m] = _nearest_in_float64(
                rows_mD[tied_m],
                centres_kD,
                half_k,
                scores_mk[tied_m].double() >= (best_m2[:, 0].double() - close_m)[tied_m, None],
            )
        nearest.append(nearest_m)
    return first_k[torch.cat(nearest)]


def _nearest_in_float64(
    rows_uD: torch.Tensor, centres_kD: torch.Tensor, half_k: torch.Tensor, possible_uk: torch.Tensor
) -> torch.Tensor:
    """As ``nearest_centre``, among the centres that are possible for each row, in a fixed order of additions."""
    row_p, centre_p = possible_uk.nonzero(as_tuple=True)
    size = max(1, CELLS // 16)
    score_p = [
        fixed_sum(rows_uD[rows].double() * centres_kD[centres]) - half_k[centres]
        for rows, centres in zip(row_p.split(size), centre_p.split(size), strict=True)
    ]
    scores_uk = torch.full(possible_uk.shape, -torch.inf, dtype=torch.float64, device=rows_uD.device)
    scores_uk[row_p, centre_p] = torch.cat(score_p)
    # NumPy's argmax gives the first of equals; torch's may give any.
    return torch.from_numpy(scores_uk.cpu().numpy().argmax(axis=1)).to(rows_uD.device)


def nmi(class_N: torch.Tensor, cluster_N: torch.Tensor) -> float:
    """Normalised mutual information of classes and clusters, by scikit-learn.

    ``NMI = 2 I(class; cluster) / (H(class) + H(cluster))`` (Manning, Raghavan, Schuetze, Introduction to Information
    Retrieval, section 16.3). 1 where both are one single group; 0 where the clusters say nothing of the classes.

    Two classes of two images. Clustered perfectly, all in one cluster, and with one image astray:

    >>> classes = torch.tensor([0, 0, 1, 1])
    >>> [round(nmi(classes, torch.tensor(of)), 6) for of in ([5, 5, 3, 3], [0, 0, 0, 0], [0, 0, 0, 1])]
    [1.0, 0.0, 0.343711]
    """
    from sklearn.metrics import normalized_mutual_info_score

    return float(normalized_mutual_info_score(class_N.cpu().numpy(), cluster_N.cpu().numpy()))


def pairwise_f1(class_N: torch.Tensor, cluster_N: torch.Tensor) -> float:
    """F1 of "these two images are of one class", over the pairs that share a cluster.

    ``F1 = 2 P R / (P + R)``, P the share of the pairs within clusters that are of one class, R the share of the pairs
    within classes that share a cluster (Song et al., Deep metric learning via lifted structured feature embedding, CVPR
    2016). 1 where there is no pair to find and none is claimed.

    Perfect; all in one cluster, so P = 2/6 and R = 1; one image astray, so P = 1/3 and R = 1/2; nothing to find:

    >>> classes = torch.tensor([0, 0, 1, 1])
    >>> [pairwise_f1(classes, torch.tensor(of)) for of in ([5, 5, 3, 3], [0, 0, 0, 0], [0, 0, 0, 1])]
    [1.0, 0.5, 0.4]
    >>> pairwise_f1(torch.tensor([0, 1]), torch.tensor([0, 1]))
    1.0
    """
    both, classes, clusters = (
        sum(n * (n - 1) // 2 for n in labels.unique(dim=0, return_counts=True)[1].tolist())
        for labels in (torch.stack([class_N, cluster_N], dim=1), class_N, cluster_N)
    )
    return 2 * both / (classes + clusters) if classes + clusters else 1.0
