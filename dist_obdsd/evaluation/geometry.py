"""Geometry of an embedding: spread of classes, directions in use, a sample.

Every rank knows all rows, by ascending id, and measures its share of the classes or of blocks of rows. Sums do not
depend on the order of the ranks. So the numbers are the same for any number of ranks.

Shapes: N images of all ranks, m images of the sample, C classes, D embedding dimension.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dist_obdsd.distributed import collectives
from dist_obdsd.errors import InputError
from dist_obdsd.evaluation.clustering import group_means
from dist_obdsd.evaluation.knn import unit_rows
from dist_obdsd.rng import rng

ROWS = 1024
"""Rows whose distances to others are held at a time."""
BLOCKS = 8
"""Blocks of rows whose Gram matrices are added up."""
RESOLUTION = 2.0**-24
"""Of float32: singular values below this share of the largest cannot be told from zero."""
SAMPLED_CLASSES, SAMPLED_IMAGES = 20, 1000
"""t-SNE of so many images takes about three seconds on a CPU core."""


def class_distances(rows_ND: torch.Tensor, class_N: torch.Tensor, *, cosine: bool) -> dict[str, float]:
    """Measure mean distances within and between classes, and their ratio. Collective.

    ``intra = mean over classes c of mean over x != y in c of d(x, y)``, classes of one image left out;
    ``inter = mean over classes b != c of d(m_b, m_c)`` with m_c the mean of class c;
    ``ratio = intra / max(inter, 1e-8)``, so that a collapsed embedding has a ratio, too (Roth et al., Revisiting
    training strategies and generalization performance in deep metric learning, ICML 2020, section 5).

    Args:
        rows_ND: the same on every rank.
        class_N: each row's class, 0..C-1; on the CPU.
        cosine: the distance of the released code, ``d(x, y) = 1 - cos(x, y)`` between rows and between the class
            means; else the Euclidean one.

    Returns:
        ``distance_intra``, ``distance_inter``, ``distance_ratio``.

    Raises:
        InputError: on every rank: fewer than two classes, or no class of two images.

    Four points on a line, classes {0, 2} and {10, 14}: within 2 and 4, so 3; the means 1 and 12 are 11 apart.

    >>> rows, classes = torch.tensor([[0.0], [2.0], [10.0], [14.0]]), torch.tensor([0, 0, 1, 1])
    >>> class_distances(rows, classes, cosine=False)
    {'distance_intra': 3.0, 'distance_inter': 11.0, 'distance_ratio': 0.2727272727272727}
    """
    sizes_C = torch.bincount(class_N)
    if len(sizes_C) < 2 or not (sizes_C > 1).any():
        message = "evaluation.metrics asks for distances, which need two classes and a class of two images; take "
        raise collectives.met_by_all(InputError(message + "distances out of evaluation.metrics"))
    C, own = len(sizes_C), slice(collectives.rank(), None, collectives.world_size())
    measured_ND = unit_rows(rows_ND.double()) if cosine else rows_ND.double()
    means_CD, _ = group_means(measured_ND, class_N.to(rows_ND.device), C)
    means_CD = unit_rows(means_CD) if cosine else means_CD
    members = class_N.argsort(stable=True).to(rows_ND.device).split(sizes_C.tolist())
    within = [
        math.fsum(_sum_of_distances(some_rD, measured_ND[of], cosine) for some_rD in measured_ND[of].split(ROWS))
        / (len(of) * (len(of) - 1))
        for of in [of for of in members if len(of) > 1][own]
    ]
    between = [_sum_of_distances(some_rD, means_CD, cosine) for some_rD in means_CD.split(ROWS)[own]]
    # fsum is exact, so that no order of the ranks matters.
    withins, betweens = (
        [x for of in column for x in of] for column in zip(*collectives.gather_json([within, between]), strict=True)
    )
    intra, inter = math.fsum(withins) / len(withins), math.fsum(betweens) / (C * (C - 1))
    return {"distance_intra": intra, "distance_inter": inter, "distance_ratio": intra / max(inter, 1e-8)}


def _sum_of_distances(some_rD: torch.Tensor, rows_cD: torch.Tensor, cosine: bool) -> float:
    distance_rc = torch.cdist(some_rD, rows_cD, compute_mode="donot_use_mm_for_euclid_dist")
    # Of unit rows, 1 - cos = |x - y|^2 / 2.
    distance_rc = distance_rc.square() / 2 if cosine else distance_rc
    return math.fsum(distance_rc.cpu().numpy().sum(axis=1).tolist())


def rho_spectrum(singular: Sequence[float], *, leave_out: int = 0) -> float:
    """Measure how unevenly the embedding uses its directions: 0 if evenly.

    ``rho = KL(U || S) = sum_i 1/m log((1/m) / s_i)``, s the m = min(N, D) singular values of the matrix of all
    embeddings (not centred), divided by their sum (Roth et al., ICML 2020, section 5.3). A singular value below 2^-24
    of the largest counts as that, since float32 rows cannot tell it from zero and the logarithm could not take it.

    Args:
        singular: the largest first.
        leave_out: smallest ones to leave out.

    Both axes used alike; one four times as much as the other, so log(0.5/0.8)/2 + log(0.5/0.2)/2:

    >>> [round(rho_spectrum(singular), 6) for singular in ([1.0, 1.0], [4.0, 1.0])]
    [0.0, 0.223144]
    """
    kept = singular[: max(1, len(singular) - leave_out)]
    if kept[0] <= 0:
        return 0.0
    values = [max(value, RESOLUTION * kept[0]) for value in kept]
    total = math.fsum(values)
    return max(0.0, math.fsum(math.log(total / (len(values) * value)) for value in values) / len(values))


def singular_values(rows_ND: torch.Tensor) -> list[float]:
    """Compute the min(N, D) singular values of all rows, descending. Collective."""
    N, D = rows_ND.shape
    gram_DD = torch.zeros(D, D, dtype=torch.float64, device=rows_ND.device)
    for number, rows_rD in enumerate(rows_ND.split(-(-N // BLOCKS))):
        source = number % collectives.world_size()
        part_DD = _gram(rows_rD.double()) if source == collectives.rank() else torch.empty_like(gram_DD)
        collectives.broadcast_([part_DD], source)
        gram_DD += part_DD
    # LAPACK may round differently on another machine, so one rank's answer is everyone's.
    squares = collectives.broadcast_object(torch.linalg.eigvalsh(gram_DD.cpu()).flip(0).tolist())
    return [math.sqrt(max(square, 0.0)) for square in squares[: min(N, D)]]


def _gram(rows_rD: torch.Tensor) -> torch.Tensor:
    """Compute X^T X on one thread: their number changes the order of additions."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return rows_rD.T @ rows_rD
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class EmbeddingSample:
    """A few classes' embeddings; the same on every rank, on the CPU."""

    rows_mD: torch.Tensor
    """By class and within it by id."""
    labels_m: torch.Tensor
    """int64, ascending."""
    singular: tuple[float, ...]
    """Singular values of the matrix of all N embeddings, the largest first."""


def sample_embeddings(rows_ND: torch.Tensor, labels_N: torch.Tensor, seed: int) -> EmbeddingSample:
    """Draw some classes, at most ``SAMPLED_IMAGES`` images in all. Collective."""
    labels_C, class_N = np.unique(labels_N.numpy(), return_inverse=True)
    generator = rng(seed, "portrait")
    classes = np.sort(generator.permutation(len(labels_C))[:SAMPLED_CLASSES])
    drawn_N = generator.permutation(len(class_N))
    most = SAMPLED_IMAGES // len(classes)
    place_m = torch.from_numpy(np.concatenate([np.sort(drawn_N[class_N[drawn_N] == c][:most]) for c in classes]))
    rows_mD = rows_ND[place_m.to(rows_ND.device)].cpu()
    return EmbeddingSample(rows_mD, labels_N[place_m], tuple(singular_values(rows_ND)))
