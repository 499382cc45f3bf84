"""The shape of an embedding: how far classes are spread and apart, and how many directions they use.

Both sum exactly (``exact``), so the numbers have the same bits for any number of ranks and any distribution of the
images.

Shapes: n images of this rank, v visiting images of another rank, N of all ranks, C classes, D embedding dimension;
p pairs of images.
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch

from dist_obdsd.distributed import collectives
from dist_obdsd.distributed.failures import raise_on_all_ranks
from dist_obdsd.errors import InputError
from dist_obdsd.evaluation.exact import FixedPoint, gram, group_means, largest_entry

PAIRS = 1 << 18  # held at a time
RESOLUTION = 2.0**-24  # of float32: singular values below this share of the largest cannot be told from zero


def class_distances(rows_nD: torch.Tensor, class_n: torch.Tensor, classes: int, *, cosine: bool) -> dict[str, float]:
    """Mean distance within the classes and between them, and their ratio. Collective; the same on every rank.

    ``intra = mean over classes c of mean over x != y in c of d(x, y)``, classes of one image left out;
    ``inter = mean over classes b != c of d(m_b, m_c)`` with m_c the mean of class c;
    ``ratio = intra / max(inter, 1e-8)``, so that a collapsed embedding has a ratio, too (Roth et al., Revisiting
    training strategies and generalization performance in deep metric learning, ICML 2020, section 5).

    Args:
        class_n: each row's class, 0..classes-1.
        cosine: the distance of the released code, ``d(x, y) = 1 - cos(x, y)`` between rows and between the class
            means; else the Euclidean one.

    Returns:
        ``distance_intra``, ``distance_inter``, ``distance_ratio``.

    Raises:
        InputError: on every rank: fewer than two classes, or no class of two images.

    Four points on a line, classes {0, 2} and {10, 14}: within 2 and 4, so 3; the means 1 and 12 are 11 apart.

    >>> class_distances(torch.tensor([[0.0], [2.0], [10.0], [14.0]]), torch.tensor([0, 0, 1, 1]), 2, cosine=False)
    {'distance_intra': 3.0, 'distance_inter': 11.0, 'distance_ratio': 0.2727272727272727}
    """
    if cosine:
        rows_nD = _unit(rows_nD.double())
    means_CD, sizes_C = group_means(rows_nD, class_n, classes)
    several_C = sizes_C > 1
    with raise_on_all_ranks("the distances of the classes"):
        if int((sizes_C > 0).sum()) < 2 or not several_C.any():
            raise InputError(
                "evaluation.metrics asks for distances, which need two classes and a class of two images; take "
                "distances out of evaluation.metrics"
            )
    # No two rows are farther apart than this.
    reach = 2 * largest_entry(rows_nD) * math.sqrt(rows_nD.shape[1])

    # Each pair of a class is met twice, once from either side, and an image meets itself at distance 0.
    number = FixedPoint(reach, int(sizes_C.max()) ** 2)
    total_C = torch.zeros(classes, dtype=torch.int64, device=rows_nD.device)
    rows_Dn = rows_nD.double().T.contiguous()
    height = max(collectives.gather_json(rows_nD.shape[0]))
    travelling = [
        torch.tensor([rows_nD.shape[0]], device=rows_nD.device),
        _padded(rows_nD, height),
        _padded(class_n, height),
    ]
    for _ in range(collectives.world_size()):
        v = int(travelling[0])
        visitors_Dv, visitor_class_v = travelling[1][:v].double().T.contiguous(), travelling[2][:v]
        for own_p, visitor_p in _pairs_of_one_class(class_n, visitor_class_v):
            distance_p = _distances((x_n[own_p] for x_n in rows_Dn), (y_v[visitor_p] for y_v in visitors_Dv), cosine)
            total_C.index_add_(0, class_n[own_p], number.encode(distance_p))
        travelling = collectives.ring_pass(travelling)
    within_C = number.decode(collectives.sum_across(total_C)) / (sizes_C * (sizes_C - 1)).clamp(min=1)
    intra = math.fsum(within_C[several_C].tolist()) / int(several_C.sum())

    centres_CD = means_CD[sizes_C > 0]
    inter = _mean_distance(_unit(centres_CD) if cosine else centres_CD, reach, cosine)
    return {"distance_intra": intra, "distance_inter": inter, "distance_ratio": intra / max(inter, 1e-8)}


def rho_spectrum(rows_nD: torch.Tensor, *, leave_out: int = 0) -> float:
    """How unevenly the embedding uses its directions: 0 if evenly. Collective; the same on every rank.

    ``rho = KL(U || S) = sum_i 1/m log((1/m) / s_i)``, s the m = min(N, D) singular values of the matrix of all
    embeddings (not centred), divided by their sum (Roth et al., ICML 2020, section 5.3). A singular value below 2^-24
    of the largest counts as that, since float32 rows cannot tell it from zero and the logarithm could not take it.

    Args:
        leave_out: smallest singular values to leave out.

    Both axes used alike; one four times as much as the other, so log(0.5/0.8)/2 + log(0.5/0.2)/2:

    >>> rho_spectrum(torch.eye(2)), round(rho_spectrum(torch.tensor([[4.0, 0.0], [0.0, 1.0]])), 6)
    (0.0, 0.223144)
    """
    return rho(singular_values(rows_nD), leave_out=leave_out)


def singular_values(rows_nD: torch.Tensor) -> list[float]:
    """The min(N, D) singular values of the matrix of all ranks' rows, the largest first. Collective; the same on every
    rank."""
    count = sum(collectives.gather_json(rows_nD.shape[0]))
    # LAPACK may round differently on another machine, so one rank's answer is everyone's.
    squares = collectives.broadcast_object(torch.linalg.eigvalsh(gram(rows_nD).cpu()).flip(0).tolist())
    return [math.sqrt(max(square, 0.0)) for square in squares[: max(1, min(count, len(squares)))]]


def rho(singular: Sequence[float], *, leave_out: int = 0) -> float:
    """``rho_spectrum`` from the singular values, the largest first."""
    kept = singular[: max(1, len(singular) - leave_out)]
    if kept[0] <= 0:
        return 0.0
    values = [max(value, RESOLUTION * kept[0]) for value in kept]
    total = math.fsum(values)
    return max(0.0, math.fsum(math.log(total / (len(values) * value)) for value in values) / len(values))


def _mean_distance(centres_CD: torch.Tensor, reach: float, cosine: bool) -> float:
    """Over all ordered pairs of different centres; the ranks take blocks of them in turn. Collective."""
    C = centres_CD.shape[0]
    number = FixedPoint(reach, C * C)
    total = torch.zeros((), dtype=torch.int64, device=centres_CD.device)
    for block_rD in centres_CD.split(max(1, PAIRS // C))[collectives.rank() :: collectives.world_size()]:
        total += number.encode(_distances(block_rD.T[:, :, None], centres_CD.T[:, None], cosine)).sum()
    return float(number.decode(collectives.sum_across(total))) / (C * (C - 1))


def _distances(x_Dp: Iterable[torch.Tensor], y_Dp: Iterable[torch.Tensor], cosine: bool) -> torch.Tensor:
    """Of pairs given dimension by dimension, summed in that order, so that the bits depend on the pair alone."""
    square_p = sum((x_p - y_p).square_() for x_p, y_p in zip(x_Dp, y_Dp, strict=True))
    assert isinstance(square_p, torch.Tensor)
    return square_p / 2 if cosine else square_p.sqrt()  # of unit rows: 1 - cos = |x - y|^2 / 2


def _pairs_of_one_class(class_n: torch.Tensor, class_v: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Index pairs (own, visitor) of one class, about ``PAIRS`` at a time; all of one image's are together."""
    sorted_v, order_v = class_v.sort()
    first_n = torch.searchsorted(sorted_v, class_n)
    count_n = torch.searchsorted(sorted_v, class_n, right=True) - first_n
    for own_m in _in_parcels(count_n):
        count_m = count_n[own_m]
        own_p = own_m.repeat_interleave(count_m)
        place_p = torch.arange(own_p.numel(), device=own_p.device) - (count_m.cumsum(0) - count_m).repeat_interleave(
            count_m
        )
        yield own_p, order_v[first_n[own_p] + place_p]


def _in_parcels(count_n: torch.Tensor) -> Iterator[torch.Tensor]:
    """0..n-1 in runs whose counts add up to about ``PAIRS``."""
    _, lengths = (count_n.cumsum(0) // PAIRS).unique_consecutive(return_counts=True)
    yield from torch.arange(count_n.numel(), device=count_n.device).split(lengths.tolist())


def _unit(rows_nD: torch.Tensor) -> torch.Tensor:
    """Rows of length 1, the length summed in the order of d; rows of zeros stay."""
    square_n = rows_nD.new_zeros(rows_nD.shape[0])
    for x_n in rows_nD.T.contiguous():
        square_n += x_n * x_n
    return rows_nD / square_n.sqrt().masked_fill(square_n == 0, 1.0)[:, None]


def _padded(x: torch.Tensor, height: int) -> torch.Tensor:
    out = x.new_zeros(height, *x.shape[1:])
    out[: x.shape[0]] = x
    return out
