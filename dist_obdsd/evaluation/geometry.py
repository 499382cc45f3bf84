"""The shape of an embedding: how far classes are spread and apart, and how many directions they use.

Classes are measured whole, each on one rank, their images by ascending id. Sums are taken in the order of the classes
or blocks (``row_blocks``). So the numbers are the same for any number of ranks and any distribution of the images.

Shapes: n images of this rank, r rows of a block, N of all ranks, C classes, D embedding dimension.
"""

import math
from collections.abc import Sequence

import torch

from dist_obdsd.distributed import collectives
from dist_obdsd.distributed.failures import raise_on_all_ranks
from dist_obdsd.errors import InputError
from dist_obdsd.evaluation.knn import unit_rows
from dist_obdsd.evaluation.row_blocks import BLOCKS, RowBlocks, gather_blocks

ROWS = 1024
"""Rows whose distances to others are held at a time."""
RESOLUTION = 2.0**-24
"""Of float32: singular values below this share of the largest cannot be told from zero."""


def class_distances(
    rows_nD: torch.Tensor, place_n: torch.Tensor, class_N: torch.Tensor, *, cosine: bool
) -> dict[str, float]:
    """Measure mean distances within and between the classes, and their ratio. Collective.

    ``intra = mean over classes c of mean over x != y in c of d(x, y)``, classes of one image left out;
    ``inter = mean over classes b != c of d(m_b, m_c)`` with m_c the mean of class c;
    ``ratio = intra / max(inter, 1e-8)``, so that a collapsed embedding has a ratio, too (Roth et al., Revisiting
    training strategies and generalization performance in deep metric learning, ICML 2020, section 5).

    Args:
        rows_nD: this rank's rows.
        place_n: each row's place by ascending id among those of all ranks.
        class_N: every row's class by ascending id, 0..C-1; the same on every rank.
        cosine: the distance of the released code, ``d(x, y) = 1 - cos(x, y)`` between rows and between the class
            means; else the Euclidean one.

    Returns:
        ``distance_intra``, ``distance_inter``, ``distance_ratio``.

    Raises:
        InputError: on every rank: fewer than two classes, or no class of two images.

    Four points on a line, classes {0, 2} and {10, 14}: within 2 and 4, so 3; the means 1 and 12 are 11 apart.

    >>> rows, classes = torch.tensor([[0.0], [2.0], [10.0], [14.0]]), torch.tensor([0, 0, 1, 1])
    >>> class_distances(rows, torch.arange(4), classes, cosine=False)
    {'distance_intra': 3.0, 'distance_inter': 11.0, 'distance_ratio': 0.2727272727272727}
    """
    sizes_C = torch.bincount(class_N)
    with raise_on_all_ranks("the distances of the classes"):
        if int((sizes_C > 0).sum()) < 2 or not (sizes_C > 1).any():
            raise InputError(
                "evaluation.metrics asks for distances, which need two classes and a class of two images; take "
                "distances out of evaluation.metrics"
            )
    # Whole classes, about equally many images a block.
    block_C = (sizes_C.cumsum(0) - sizes_C) * BLOCKS // len(class_N)
    class_n = class_N[place_n.cpu()]
    within: list[tuple[int, float]] = []
    means_CD = torch.zeros(len(sizes_C), rows_nD.shape[1], dtype=torch.float64, device=rows_nD.device)
    measured_nD = unit_rows(rows_nD.double()) if cosine else rows_nD.double()
    for rows_rD, place_r in gather_blocks(measured_nD, place_n, block_C[class_n]).values():
        of_r = class_N[place_r.cpu()].to(rows_rD.device)
        for c in of_r.unique().tolist():
            members_cD = rows_rD[of_r == c]
            means_CD[c] = torch.from_numpy(members_cD.cpu().numpy().mean(axis=0))
            if len(members_cD) > 1:
                within.append((c, _sum_of_distances(members_cD, cosine) / (len(members_cD) * (len(members_cD) - 1))))
    everyone = sorted(pair for of_rank in collectives.gather_json(within) for pair in of_rank)
    intra = math.fsum(value for _, value in everyone) / len(everyone)
    means_CD = collectives.sum_across(means_CD)[(sizes_C > 0).to(rows_nD.device)]  # each class is on one rank
    C = len(means_CD)
    inter = _sum_of_distances(unit_rows(means_CD) if cosine else means_CD, cosine, over_ranks=True) / (C * (C - 1))
    return {"distance_intra": intra, "distance_inter": inter, "distance_ratio": intra / max(inter, 1e-8)}


def _sum_of_distances(rows_cD: torch.Tensor, cosine: bool, over_ranks: bool = False) -> float:
    """Sum over all ordered pairs of rows.

    Args:
        over_ranks: the ranks hold the same rows and share the work. Collective.
    """
    rank, world = (collectives.rank(), collectives.world_size()) if over_ranks else (0, 1)
    sums = []
    for number, some_rD in enumerate(rows_cD.split(ROWS)):
        if number % world == rank:
            distance_rc = torch.cdist(some_rD, rows_cD, compute_mode="donot_use_mm_for_euclid_dist")
            # Of unit rows, 1 - cos = |x - y|^2 / 2.
            distance_rc = distance_rc.square() / 2 if cosine else distance_rc
            sums.append((number, math.fsum(distance_rc.cpu().numpy().sum(axis=1).tolist())))
    if over_ranks:
        sums = sorted(pair for of_rank in collectives.gather_json(sums) for pair in of_rank)
    return math.fsum(value for _, value in sums)


def rho_spectrum(blocks: RowBlocks, *, leave_out: int = 0) -> float:
    """Measure how unevenly the embedding uses its directions: 0 if evenly. Collective.

    ``rho = KL(U || S) = sum_i 1/m log((1/m) / s_i)``, s the m = min(N, D) singular values of the matrix of all
    embeddings (not centred), divided by their sum (Roth et al., ICML 2020, section 5.3). A singular value below 2^-24
    of the largest counts as that, since float32 rows cannot tell it from zero and the logarithm could not take it.

    Args:
        leave_out: smallest singular values to leave out.

    Both axes used alike; one four times as much as the other, so log(0.5/0.8)/2 + log(0.5/0.2)/2:

    >>> from dist_obdsd.evaluation.row_blocks import build_row_blocks
    >>> even, uneven = torch.eye(2), torch.tensor([[4.0, 0.0], [0.0, 1.0]])
    >>> [round(rho_spectrum(build_row_blocks(rows, torch.arange(2))), 6) for rows in (even, uneven)]
    [0.0, 0.223144]
    """
    return rho(singular_values(blocks), leave_out=leave_out)


def singular_values(blocks: RowBlocks) -> list[float]:
    """Compute the min(N, D) singular values of the matrix of all rows, the largest first. Collective."""
    gram_DD = blocks.sum(lambda _, rows_rD: _gram(rows_rD.double()), (blocks.D, blocks.D))
    # LAPACK may round differently on another machine, so one rank's answer is everyone's.
    squares = collectives.broadcast_object(torch.linalg.eigvalsh(gram_DD.cpu()).flip(0).tolist())
    return [math.sqrt(max(square, 0.0)) for square in squares[: max(1, min(blocks.N, len(squares)))]]


def _gram(rows_rD: torch.Tensor) -> torch.Tensor:
    """Compute X^T X on one thread: their number changes the order of additions."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return rows_rD.T @ rows_rD
    finally:
        torch.set_num_threads(threads)


def rho(singular: Sequence[float], *, leave_out: int = 0) -> float:
    """``rho_spectrum`` from the singular values, the largest first."""
    kept = singular[: max(1, len(singular) - leave_out)]
    if kept[0] <= 0:
        return 0.0
    values = [max(value, RESOLUTION * kept[0]) for value in kept]
    total = math.fsum(values)
    return max(0.0, math.fsum(math.log(total / (len(values) * value)) for value in values) / len(values))
