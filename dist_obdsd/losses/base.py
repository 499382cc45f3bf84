"""The interface of the ranking losses, and Euclidean distances.

Legend: b anchors of this rank, B rows of the global batch, D embedding dimension.
"""

import torch
from torch import nn

from dist_obdsd.distributed import collectives
from dist_obdsd.distributed.collectives import Group
from dist_obdsd.losses.across_ranks import InputChecks, combine
from dist_obdsd.losses.batch_view import BatchView, PartialMean
from dist_obdsd.manifold.similarity import without_autocast


class RankingLoss(nn.Module):
    """A ranking loss over the global batch, exact on any number of ranks.

    A subclass defines ``partial_means``. Its own parameters, if it has any, are the same on every rank.

    >>> from dist_obdsd.losses.batch_view import PartialMean
    >>> class Pull(RankingLoss):  # a mean of -cosine over all pairs of one class
    ...     def partial_means(self, view):
    ...         positive_bB, _ = view.positives_negatives()
    ...         return {"ranking": PartialMean(-view.S_bB[positive_bB].sum(), positive_bB.sum().float())}
    >>> loss = Pull()(embeddings, labels)  # [b, D] unit rows and [b] class indices of this rank
    >>> loss.backward()  # under DDP: the gradient of the whole batch
    """

    num_classes: int | None = None
    """Number of classes that the loss has parameters for; labels must be smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        """How many batches were viewed in training: the seed of what a loss draws."""
        self._checks = InputChecks()
        self._alike = False

    def partial_means(self, view: BatchView) -> dict[str, PartialMean]:
        """Compute this rank's share of each part.

        Returns:
            Parts whose means add up to the loss, by names that begin with ``ranking``, the same on every rank and in
            every step. The first part's count is logged as the number of anchors. Every sum depends on ``view.E_BD``
            and on each parameter (through ``view.shared``), also where nothing counts: it is then 0 and its gradient 0.
            Embeddings that are not finite give at least one sum that is NaN.

        Raises:
            InputError: if the embeddings do not fit the loss's parameters.
        """
        raise NotImplementedError

    def forward(self, embeddings_bD: torch.Tensor, labels_b: torch.Tensor, *, group: Group = None) -> torch.Tensor:
        """Compute the loss of the global batch, as ``OBDSDLoss`` does. Collective."""
        with collectives.within(group):
            view = self.view(embeddings_bD, labels_b, self._checks)
            terms = self.partial_means(view)
            return combine(view, terms, dict.fromkeys(terms, 1.0), self._checks).loss

    def view(
        self, embeddings_bD: torch.Tensor, labels: torch.Tensor, checks: InputChecks, seed: int | None = None
    ) -> BatchView:
        """Gather embeddings, with gradient, and labels. Collective."""
        checks.shapes(embeddings_bD, labels)
        if not self._alike:  # all ranks begin with rank 0's parameters, as under DDP
            collectives.broadcast_([*self.parameters(), *self.buffers()])
            self._alike = True
        self.calls += self.training and torch.is_grad_enabled()  # not in a validation pass
        b, W = len(embeddings_bD), collectives.world_size()
        labels, notes = checks.labels(labels.to(embeddings_bD.device, non_blocking=True), self.num_classes)
        embeddings_bD, more_notes = checks.unit_rows("batch", embeddings_bD)
        embeddings_BD = collectives.gather_rows(embeddings_bD)
        labels_B = collectives.AsyncAllGather(labels).wait() if len(labels) < W * b else labels
        return BatchView(
            embeddings_bD, embeddings_BD, labels_B, collectives.rank() * b, self.calls if seed is None else seed,
            collectives.mean_gradient, notes + more_notes,
        )  # fmt: skip


class LearnableLoss(RankingLoss):
    """A ranking loss with parameters, which have an ``lr`` and ``weight_decay``."""


def graph_zero(view: BatchView) -> torch.Tensor:
    """Make a scalar 0 that depends on every row; NaN if any is not finite.

    The backward of the gather is a collective, so no rank may leave ``E_BD`` out. And mining forgets NaN.
    """
    return (view.E_BD * 0).sum(dtype=torch.promote_types(view.E_BD.dtype, torch.float32))


def squared_distances(view: BatchView) -> torch.Tensor:
    """Compute squared Euclidean distances [b, B] of own rows, in float32 or float64.

        |x - y|^2 = |x - c|^2 + |y - c|^2 - 2 (x - c).(y - c)

    The centre c, the batch's mean, keeps digits where all rows lie close together. Rounding may give values below 0.
    """
    return _squares(view)[0]


def distances(view: BatchView) -> torch.Tensor:
    """Compute Euclidean distances [b, B] of own rows, in float32 or float64.

    A distance that rounding cannot tell from 0 (below about 4e-8 for float64 and 1e-3 for float32 unit rows) is 0 with
    gradient 0, since the square root has no slope there.
    """
    d2_bB, sizes_bB = _squares(view)
    zero_bB = d2_bB.detach() <= sizes_bB * (4 * torch.finfo(d2_bB.dtype).eps)  # a NaN is not, and stays
    return d2_bB.masked_fill(zero_bB, 1).sqrt().masked_fill(zero_bB, 0)


def _squares(view: BatchView) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute squared distances, and the sums |x - c|^2 + |y - c|^2 that round them."""
    dtype = torch.promote_types(torch.promote_types(view.E_bD.dtype, view.E_BD.dtype), torch.float32)
    X_bD, Y_BD = view.E_bD.to(dtype), view.E_BD.to(dtype)
    centre_D = Y_BD.detach().mean(0)
    X_bD, Y_BD = X_bD - centre_D, Y_BD - centre_D
    sizes_bB = X_bD.square().sum(1, keepdim=True) + Y_BD.square().sum(1)
    with without_autocast(X_bD.device):
        return torch.addmm(sizes_bB, X_bD, Y_BD.T, alpha=-2), sizes_bB.detach()
