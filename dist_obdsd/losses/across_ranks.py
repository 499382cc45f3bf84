"""From the ranks' terms to the loss of the global batch: check and combine.

Legend: b rows of this rank, B = W * b rows of the global batch, D embedding dimension, W ranks, n terms.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from dist_obdsd.distributed import collectives
from dist_obdsd.errors import InputError
from dist_obdsd.losses.batch_view import BatchView, Note, PartialMean
from dist_obdsd.transfer import AsyncHostCopy

CPU = torch.device("cpu")
LENGTH_TOLERANCE = 0.02
"""How far a row's length may be from 1; the rounding of bfloat16 makes up to 0.4 %."""
LARGEST_LABEL = 2**24 - 1
"""The losses compare labels as float32 numbers, which are exact up to here."""


@dataclass(frozen=True)
class LossOutput:
    """The loss of one global batch, and what was measured on the way.

    >>> out = OBDSDLoss(MultiSimilarityLoss(), target="none")(embeddings, labels)
    >>> sorted(out.metrics)
    ['anchors', 'ranking']
    """

    loss: torch.Tensor
    """Scalar, that of the global batch. DDP's mean of its gradients over the ranks is exactly that of one process."""
    names: tuple[str, ...]
    """The names of the terms, the same on every rank."""
    means_n: torch.Tensor
    """float64 [n], each term's mean over the global batch, without gradient and still on the device."""
    counts_n: torch.Tensor
    """float64 [n], how many rows, anchors or pairs each of them is a mean over."""
    nonfinite: torch.Tensor
    """Scalar, the number of ranks with a sum that is NaN or infinite."""
    summed: torch.Tensor
    """Sums over the ranks of the numbers given as ``also_sum``."""
    student_BD: torch.Tensor
    """The gathered embeddings, without gradient."""
    teacher_BD: torch.Tensor | None = None
    """The gathered teacher's embeddings, if there are any."""

    @property
    def metrics(self) -> dict[str, torch.Tensor]:
        """The terms' global means by name, and ``anchors``, the ranking's first count."""
        return dict(zip(self.names, self.means_n.unbind(), strict=True)) | {"anchors": self.counts_n[0]}


@dataclass
class InputChecks:
    """Checks of numbers on the device; their outcome travels in the loss's message.

    Where the batch lies on a GPU, the host learns of it at the next call and does not wait; the loss is 0 till then.
    """

    values: bool = True
    """Compare sizes at every step, and look at the numbers; false compares the sizes of the first step only."""
    normalize: bool = False
    """Divide rows by their length, in place of a look at it."""
    _compared: set[str] = field(default_factory=set)
    _pending: tuple[list[str], AsyncHostCopy] | None = None

    def shapes(self, embeddings_bD: torch.Tensor, labels: torch.Tensor) -> None:
        """Check types and shapes, also across the ranks, or raise InputError or RunError."""
        self.raise_pending()
        self.sizes("embeddings", embeddings_bD, labels)  # first: what follows is then found on every rank or on none
        if embeddings_bD.dim() != 2 or not embeddings_bD.is_floating_point() or not len(embeddings_bD):
            raise InputError(
                f"the embeddings are {embeddings_bD.dtype} of shape {tuple(embeddings_bD.shape)}; they must be "
                f"floating point of shape (b, D), this rank's rows, at least one"
            )
        b, W = len(embeddings_bD), collectives.world_size()
        if labels.dtype != torch.int64 or labels.shape not in {(b,), (b * W,)}:
            raise InputError(
                f"the labels are {labels.dtype} of shape {tuple(labels.shape)}; they must be a tensor of int64 class "
                f"indices, ({b},), one for each of this rank's rows" + f", or ({b * W},), of all ranks" * (W > 1)
            )

    def sizes(self, what: str, *tensors: torch.Tensor) -> None:
        """Compare the ranks' shapes before a gather, or raise RunError. Collective."""
        # Where all that is sent lies on a GPU, another comparison would make the host wait.
        again = self.values and collectives.sends_from(CPU) == CPU
        if collectives.world_size() > 1 and (again or what not in self._compared):
            collectives.assert_equal_across_ranks(
                f"the shape of the {what}",
                ", ".join(f"{tuple(x.shape)} of {x.dtype}" for x in tensors),
                advice="give every rank as many rows (drop_last=True of a DataLoader drops a shorter last batch)",
            )
            self._compared.add(what)

    def unit_rows(self, what: str, rows_bD: torch.Tensor) -> tuple[torch.Tensor, list[Note]]:
        """Normalize rows [b, D], or check their length; the loss shows what is not finite."""
        if self.normalize:
            return functional.normalize(rows_bD.to(torch.promote_types(rows_bD.dtype, torch.float32))), []
        if not self.values:
            return rows_bD, []
        far_b = (rows_bD.detach().float().norm(dim=1) - 1).abs() > LENGTH_TOLERANCE
        message = (
            f"the {what} has {{}} rows that are not of length 1; normalize them (torch.nn.functional.normalize) or "
            f"make the loss with normalize=True"
        )
        return rows_bD, [(message, (far_b & rows_bD.detach().isfinite().all(1)).sum())]

    def labels(self, labels_b: torch.Tensor, num_classes: int | None) -> tuple[torch.Tensor, list[Note]]:
        """Check that labels are class indices; return them with safe values."""
        if not self.values:
            return labels_b, []
        largest = LARGEST_LABEL if num_classes is None else num_classes - 1
        message = f"{{}} labels lie outside 0 to {largest}; number the classes from 0"
        if num_classes is not None:
            message += f", or make the ranking loss with more than {num_classes} classes"
        return labels_b.clamp(0, largest), [(message, ((labels_b < 0) | (labels_b > largest)).sum())]

    def settle(self, messages: list[str], counts: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        """Raise now or, on a GPU, at the next call; return the loss, 0 if refused."""
        if not messages:
            return loss
        self._pending = messages, AsyncHostCopy(counts)
        if not counts.is_cuda:
            self.raise_pending()
        return torch.where(counts.sum() > 0, torch.zeros_like(loss), loss)

    def raise_pending(self) -> None:
        """Raise what the latest step was refused for, an InputError on every rank."""
        if self._pending is not None:
            (messages, counts), self._pending = self._pending, None
            for message, count in zip(messages, counts.read(), strict=True):
                if count:
                    raise collectives.met_by_all(InputError(message.format(int(count))))


def combine(
    view: BatchView, terms: Mapping[str, PartialMean], factors: Mapping[str, float], checks: InputChecks,
    also_sum: Sequence[float] = (), teacher_BD: torch.Tensor | None = None,
) -> LossOutput:  # fmt: skip
    """Make the loss of all ranks' terms. Collective, one small all-reduce.

    Args:
        factors: of the terms that make the loss, by name; the others are only measured.
        also_sum: numbers of the caller to be added up over the ranks in the same message.
    """
    n, extra = len(terms), len(also_sum)
    sums = torch.stack([term.sum.detach().double() for term in terms.values()])
    counts = torch.stack([term.count.detach().double() for term in terms.values()])
    nonfinite = (~torch.isfinite(sums)).any().double()[None]
    found = [count.double()[None] for _, count in view.notes]
    # A fill takes its number along; a tensor made of numbers would be a copy to the GPU that the host waits for.
    extras = [sums.new_full((1,), float(number)) for number in also_sum]
    total = collectives.sum_across(torch.cat([sums, counts, nonfinite, *found, *extras]))
    sums, counts, nonfinite, bad, summed = total.split([n, n, 1, len(found), extra])
    means = sums / torch.where(counts == 0, 1, counts)
    loss = local_loss(terms, dict(zip(terms, counts, strict=True)), factors, collectives.world_size())
    if collectives.world_size() > 1:
        value = torch.stack([mean * factors[name] for name, mean in zip(terms, means, strict=True) if name in factors])
        loss = loss - loss.detach() + value.sum().to(loss.dtype)  # this rank's gradient, and everyone's value
    loss = checks.settle([message for message, _ in view.notes], bad, loss)
    return LossOutput(loss, tuple(terms), means, counts, nonfinite[0], summed, view.E_BD.detach(), teacher_BD)


def local_loss(
    terms: Mapping[str, PartialMean], global_counts: Mapping[str, torch.Tensor], factors: Mapping[str, float],
    world_size: int,
) -> torch.Tensor:  # fmt: skip
    """Compute this rank's scalar for backward; its mean over ranks is the loss.

    With the gathered rows' gradients summed over the ranks, rank r's parameter gradient is that of everyone's loss
    through r's rows. DDP then takes the mean over the W ranks. So each term enters as local_sum * W / global_count, and
    what DDP makes is exactly d(global_sum / global_count), as in one process with the whole batch. A count of 0 gives a
    loss and a gradient of 0.
    """
    sums_n = torch.stack([terms[name].sum for name in factors])
    counts_n = torch.stack([global_counts[name] for name in factors]).to(sums_n.dtype)
    factors_n = torch.stack([sums_n.new_full((), factor * world_size) for factor in factors.values()])
    return sums_n @ (factors_n / (counts_n + (counts_n == 0)))
