"""A sample of an evaluation's embeddings, for figures, and all singular values."""

from dataclasses import dataclass

import numpy as np
import torch

from dist_obdsd.evaluation.eval_index import EvalIndex
from dist_obdsd.evaluation.geometry import singular_values
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


def sample_embeddings(rows_ND: torch.Tensor, index: EvalIndex, seed: int) -> EmbeddingSample:
    """Draw ``CLASSES`` classes, at most ``IMAGES`` images in all. Collective."""
    class_N, generator = index.classes[1].numpy(), rng(seed, "portrait")
    classes = np.sort(generator.permutation(int(class_N.max()) + 1)[:CLASSES])
    drawn_N = generator.permutation(len(class_N))
    by_draw = class_N[drawn_N]
    place_m = torch.from_numpy(
        np.concatenate([np.sort(drawn_N[by_draw == c][: IMAGES // len(classes)]) for c in classes])
    )
    rows_mD = rows_ND[place_m.to(rows_ND.device)].cpu()
    return EmbeddingSample(rows_mD, index.labels_N[place_m], tuple(singular_values(rows_ND)))
