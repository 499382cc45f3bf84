"""k-means over all ranks, and how well a clustering agrees with the classes.

Every rank knows all rows and assigns its share of them. Where a row's two best centres lie closer than the rounding of
float32, float64 scores in a fixed order decide, ties going to the first centre. Centres are sums in the order of the
rows. So the clusters are the same for any number of ranks and threads.

Shapes: r rows, N of all ranks, k clusters, D embedding dimension; u rows whose centres lie close.
"""

import numpy as np
import torch

from dist_obdsd.distributed import collectives
from dist_obdsd.errors import InputError
from dist_obdsd.evaluation.knn import fixed_sum, pair_scores
from dist_obdsd.evaluation.knn_backends import ROUNDING
from dist_obdsd.rng import rng

ITERATIONS = 20
"""Updates of the centres at most, as the released code has it."""
CELLS = 1 << 19
"""Scores held at a time, few enough for a cache."""
CLOSE = ROUNDING[torch.float32]


def k_means(
    rows_ND: torch.Tensor, k: int, *, seed: int, iterations: int = ITERATIONS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cluster rows by Lloyd's k-means (1982). Collective.

    It starts from k rows drawn without replacement, as faiss does and so the released code; clusters are numbered by
    their start's place. A cluster that ends up empty is given the row farthest from its own centre (ties: the first),
    if one lies off its centre. The iterations end when no row changes its cluster.

    Args:
        rows_ND: finite rows, by ascending id and the same on every rank.
        k: clusters, at most N.

    Returns:
        (each row's cluster [N] int64, centres [k, D] float64), the same on every rank.

    Raises:
        InputError: on every rank: k is below 1 or above N.
    """
    N, rank, world = len(rows_ND), collectives.rank(), collectives.world_size()
    if not 1 <= k <= N:
        message = f"k-means into {k} clusters needs at least as many images, but there are {N}"
        raise collectives.met_by_all(InputError(message))
    start_k = torch.from_numpy(np.sort(rng(seed, "k-means").permutation(N)[:k]))
    centres_kD = rows_ND[start_k.to(rows_ND.device)].double()
    own_rD = rows_ND[N * rank // world : N * (rank + 1) // world]
    counts = [N * (r + 1) // world - N * r // world for r in range(world)]
    norm_r = own_rD.double().norm(dim=1)
    cluster_N = collectives.gather_ragged(nearest_centre(own_rD, norm_r, centres_kD), counts)
    for _ in range(iterations):
        before_N = cluster_N
        centres_kD = _means(rows_ND, cluster_N, k)
        cluster_N = collectives.gather_ragged(nearest_centre(own_rD, norm_r, centres_kD), counts)
        if torch.equal(cluster_N, before_N):
            break
    return cluster_N, centres_kD


def _means(rows_ND: torch.Tensor, cluster_N: torch.Tensor, k: int) -> torch.Tensor:
    """The clusters' means [k, D] float64; empty clusters get the farthest rows."""
    means_kD, sizes_k = group_means(rows_ND, cluster_N, k)
    empty_e = (sizes_k == 0).nonzero().flatten()
    if len(empty_e):
        distance_N = fixed_sum((rows_ND.double() - means_kD[cluster_N]).square())
        far_e = distance_N.argsort(descending=True, stable=True)[: len(empty_e)]
        far_e = far_e[distance_N[far_e] > 0]
        means_kD[empty_e[: len(far_e)]] = rows_ND[far_e].double()
    return means_kD


def group_means(rows_ND: torch.Tensor, group_N: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Average the rows of each group: (float64 [k, D], sizes [k]).

    A group without rows has a mean of 0.
    """
    order_N = group_N.argsort(stable=True)
    sizes_k = torch.bincount(group_N, minlength=k)
    starts_k = (sizes_k.cumsum(0) - sizes_k)[sizes_k > 0].cpu().numpy()
    sums_kD = torch.zeros(k, rows_ND.shape[1], dtype=torch.float64, device=rows_ND.device)
    sums = np.add.reduceat(rows_ND[order_N].double().cpu().numpy(), starts_k, axis=0)
    sums_kD[sizes_k > 0] = torch.from_numpy(sums).to(rows_ND.device)
    return sums_kD / sizes_k.clamp(min=1)[:, None], sizes_k


def nearest_centre(rows_rD: torch.Tensor, norm_r: torch.Tensor, centres_kD: torch.Tensor) -> torch.Tensor:
    """Find each row's nearest centre (Euclidean, ties to the first): [r] int64.

    |x - c|^2 is smallest where s = x.c - |c|^2/2 is largest. ``norm_r`` and ``centres_kD`` are float64.
    """
    # Equal centres would be a tie for every row, so only the first of each is asked.
    _, first = np.unique(centres_kD.cpu().numpy(), axis=0, return_index=True)
    first_k = torch.from_numpy(np.sort(first)).to(rows_rD.device)
    centres_kD = centres_kD[first_k]
    half_k = fixed_sum(centres_kD.square()) / 2
    rough_Dk, rough_half_k = centres_kD.T.float().contiguous(), half_k.float()
    longest = float(half_k.max().mul(2).sqrt())
    nearest = [torch.empty(0, dtype=torch.int64, device=rows_rD.device)]
    size = max(1, CELLS // len(first_k))
    for rows_mD, norm_m in zip(rows_rD.split(size), norm_r.split(size), strict=True):
        scores_mk = torch.addmm(-rough_half_k, rows_mD.float(), rough_Dk)
        best_m2, centre_m2 = scores_mk.topk(min(2, len(first_k)), dim=1)
        floor_m = best_m2[:, 0].double() - CLOSE * (norm_m + longest) ** 2
        nearest_m, close_u = centre_m2[:, 0].clone(), (best_m2[:, -1].double() >= floor_m).nonzero().flatten()
        if len(first_k) > 1 and len(close_u):
            row_p, centre_p = (scores_mk[close_u].double() >= floor_m[close_u, None]).nonzero(as_tuple=True)
            exact_uk = torch.full((len(close_u), len(first_k)), -torch.inf, dtype=torch.float64, device=rows_mD.device)
            exact_p = pair_scores(rows_mD[close_u], centres_kD, row_p, centre_p, "cosine") - half_k[centre_p]
            exact_uk[row_p, centre_p] = exact_p
            # NumPy's argmax gives the first of equals; torch's may give any.
            nearest_m[close_u] = torch.from_numpy(exact_uk.cpu().numpy().argmax(axis=1)).to(rows_mD.device)
        nearest.append(nearest_m)
    return first_k[torch.cat(nearest)]


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
