"""A sample of the embeddings of an evaluation, for figures, and the singular values of all of them.

Shapes: n images of this rank, N different images of all ranks, m images of the sample, D embedding dimension.
"""

from dataclasses import dataclass

import numpy as np
import torch

from dist_obdsd.distributed import collectives
from dist_obdsd.evaluation.eval_index import EvalIndex
from dist_obdsd.evaluation.geometry import singular_values
from dist_obdsd.evaluation.row_blocks import RowBlocks
from dist_obdsd.rng import rng

CLASSES = 20
"""Classes in the sample."""
IMAGES = 1000
"""Images in the sample: t-SNE of so many takes about three seconds on a CPU core."""


@dataclass(frozen=True)
class EmbeddingSample:
    """The same on every rank, on the CPU."""

    rows_mD: torch.Tensor
    """Embeddings, by class and within it by id."""
    labels_m: torch.Tensor
    """int64, ascending."""
    singular: tuple[float, ...]
    """Singular values of the matrix of all N embeddings, the largest first."""


def sample_embeddings(
    rows_nD: torch.Tensor, place_n: torch.Tensor, index: EvalIndex, blocks: RowBlocks, seed: int
) -> EmbeddingSample:
    """Gather a sample of the embeddings. Collective.

    Args:
        rows_nD: this rank's images, each image on one rank only.
        place_n: their places in the index.
        blocks: the same rows.
        seed: of the sample: ``CLASSES`` classes and as many images of each, at most ``IMAGES`` in all.
    """
    places = torch.from_numpy(_sample(index.classes[1].numpy(), seed))
    chosen_n = torch.isin(place_n.cpu(), places)
    rows_mD = collectives.gather_ragged(rows_nD[chosen_n.to(rows_nD.device)]).cpu()
    place_m = collectives.gather_ragged(place_n.cpu()[chosen_n])
    by_place = place_m.argsort()
    labels_m, rows_mD = index.labels_N[place_m[by_place]], rows_mD[by_place]
    labels_m, by_label = labels_m.sort(stable=True)
    return EmbeddingSample(rows_mD[by_label], labels_m, tuple(singular_values(blocks)))


def _sample(class_N: np.ndarray, seed: int) -> np.ndarray:
    """The places of the sample's images."""
    generator = rng(seed, "portrait")
    classes = generator.permutation(int(class_N.max()) + 1)[:CLASSES]
    drawn_N = generator.permutation(class_N.size)
    by_draw = class_N[drawn_N]
    return np.concatenate([drawn_N[by_draw == c][: IMAGES // len(classes)] for c in classes])
