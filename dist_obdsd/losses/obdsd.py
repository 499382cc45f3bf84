"""The objective: ranking loss plus self-distillation over the gathered batch.

    loss = ranking(E, labels) + ramp * weight * temperature^2 * KL( target || softmax(E E^T / temperature) )

Every rank computes its own rows against all columns and hands on sums and counts, never means: the ranks may keep
different numbers of anchors, and a mean of their means is another loss.

Legend: b rows of this rank, B rows of the global batch, M of the memory, D embedding dimension, W ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from dist_obdsd.config.registry import TARGETS
from dist_obdsd.distributed import collectives
from dist_obdsd.distributed.collectives import AsyncAllGather, Group
from dist_obdsd.errors import InputError, require
from dist_obdsd.losses import distillation
from dist_obdsd.losses.across_ranks import InputChecks, LossOutput, combine
from dist_obdsd.losses.base import RankingLoss
from dist_obdsd.losses.batch_view import BatchView, Note, PartialMean
from dist_obdsd.losses.gathered import GatheredLoss
from dist_obdsd.manifold import targets as manifold
from dist_obdsd.manifold.diffusion import Diffusion


@dataclass(frozen=True)
class TeacherRows:
    """All ranks' teacher rows on their way, and perhaps a diffusion over them."""

    gathering: AsyncAllGather
    notes: list[Note]
    pending: manifold.PendingTarget | None


class OBDSDLoss(nn.Module):
    """A ranking loss with self-distillation over all ranks (arXiv 2211.07566).

    >>> loss = OBDSDLoss(MultiSimilarityLoss(), weight=10.0)
    >>> teacher = ProgressiveTeacher(student)
    >>> for epoch in range(2):
    ...     for images, labels in batches:  # this rank's
    ...         out = loss(student(images), labels, teacher(images), ramp=epoch / 2)
    ...         out.loss.backward()  # and the optimizer's step
    ...     teacher.update(student)
    ...     loss.reset_memory()

    It works in any process group or none, and under any wrapper that averages the gradients over the ranks. Learnable
    parts of the ranking loss are ordinary parameters, whose gradients are averaged already.
    """

    def __init__(
        self,
        ranking: nn.Module,
        *,
        target: str = "obdsd",
        weight: float = 1.0,
        temperature: float = 0.1,
        transition_temperature: float = 0.05,
        omega: float = 0.5,
        memory: int = 0,
        scope: Literal["global", "rank"] = "global",
        group: Group = None,
        normalize: bool = False,
        validate: bool = True,
        **diffusion: Any,
    ) -> None:
        """
        Args:
            ranking: a ``RankingLoss``, or any module called with embeddings [B, D] and labels [B] of the global batch.
            target: ``none``, ``uniform``, ``psd``, ``obdsd`` or ``obdsd_symmetric``.
            weight: of the distillation.
            temperature: of the student's and the teacher's softmax over the batch.
            transition_temperature: of the random walk's transition matrix.
            omega: how far the diffusion goes, from 0 (psd) to below 1.
            memory: teacher's rows of earlier training batches that the diffusion also runs over.
            scope: ``global``, or ``rank`` for a target over each rank's own part of the batch.
            group: the process group whose ranks share a batch; None is the default one.
            normalize: divide embeddings and teacher's rows by their length first.
            validate: check labels and lengths of rows. The outcome travels with the loss, so no GPU is waited for.
            diffusion: further fields of ``manifold.diffusion.Diffusion``, such as ``neighbours``, ``tolerance``.

        Raises:
            InputError: the target is unknown or a number is out of its range.
        """
        super().__init__()
        self.ranking = ranking if isinstance(ranking, RankingLoss) else GatheredLoss(ranking)
        self.weight, self.scope, self.memory, self.group = weight, scope, memory, group
        self.target: type[manifold.Target] | None = None if target == "none" else TARGETS.load(target)
        self.diffusion = Diffusion(target, temperature, transition_temperature, omega, **diffusion)
        require("weight", weight, weight >= 0, "at least 0")
        require("memory", memory, memory >= 0, "at least 0")
        require("scope", scope, scope in ("global", "rank"), "global or rank")
        self._checks = InputChecks(validate, normalize)
        self.memory_MD: torch.Tensor | None = None
        """The teacher's rows of this epoch's latest batches, newest first; the same on every rank."""
        self._plan = manifold.QueuePlan()

    def needs_teacher(self, ramp: float = 1.0) -> bool:
        """Tell if the teacher's rows have an effect, else its forward pass is left out."""
        return self.target is not None and self.target.needs_teacher and ramp * self.weight > 0

    def start_teacher(self, teacher_bD: torch.Tensor, early: bool | None = None) -> TeacherRows:
        """Start to gather the teacher's rows, for ``teacher_bD`` of a later call.

        Collective. The rows travel while the student runs.

        Args:
            teacher_bD: unit rows [b, D'] of this rank, without gradient.
            early: whether the diffusion is queued now, too, so that its error is known before the host asks. It takes
                more products than it needs. None: on a GPU, which has nothing else to do while the host waits.
        """
        with collectives.within(self.group):
            self._checks.sizes("teacher's rows", teacher_bD)
            teacher_bD, notes = self._checks.unit_rows("teacher's batch", teacher_bD)
            gathering, pending = AsyncAllGather(teacher_bD), None
            if (teacher_bD.is_cuda if early is None else early) and self.target is not None and self.target.graph:
                b, rank = len(teacher_bD), collectives.rank()
                T_BD, rows = self._scoped(gathering.wait(), slice(rank * b, (rank + 1) * b))
                pending = manifold.start_async(T_BD, rows, self.diffusion, self.memory_MD, self._plan)
        return TeacherRows(gathering, notes, pending)

    def forward(
        self,
        embeddings_bD: torch.Tensor,
        labels_b: torch.Tensor,
        teacher_bD: torch.Tensor | TeacherRows | None = None,
        *,
        ramp: float = 1.0,
        seed: int | None = None,
        also_sum: Sequence[float] = (),
    ) -> LossOutput:
        """Compute the loss of the global batch. Collective.

        A batch without a positive pair gives a ranking loss of 0 with a usable backward.

        Args:
            embeddings_bD: the student's unit rows of this rank, with gradient.
            labels_b: int64 class indices [b]; or [B], of all ranks in rank order, which saves a message.
            teacher_bD: the teacher's unit rows of the same images, whose D may differ, or what ``start_teacher`` gave.
            ramp: factor of the distillation: epoch / epochs, where ``epoch`` counts from 0, as published.
            seed: of what the ranking loss draws, the same on every rank; None: the number of the call.
            also_sum: numbers of the caller that are added up over the ranks in the loss's own message.

        Raises:
            InputError, RunError: on every rank, for batches that differ in size, labels outside the loss's classes,
                rows that are not of length 1, or a missing teacher. On a GPU the numbers of a batch are judged at the
                next call.
        """
        if teacher_bD is None and self.needs_teacher(ramp):
            raise InputError(
                f"the ramp is {ramp} and the weight {self.weight:g}, but there are no teacher's rows; give teacher_bD, "
                f"or ramp=0 in the first epoch"
            )
        if isinstance(teacher_bD, torch.Tensor):
            teacher_bD = self.start_teacher(teacher_bD, early=False)
        with collectives.within(self.group):
            view = self.ranking.view(embeddings_bD, labels_b, self._checks, seed)
            T_BD, pending = None, None
            if teacher_bD is not None:
                T_BD, pending = teacher_bD.gathering.wait(), teacher_bD.pending
                if len(T_BD) != view.B:  # on every rank or on none, as the shapes were compared
                    raise InputError(
                        f"the teacher has {len(T_BD) // view.world_size} rows and the student {view.b}; both must "
                        f"embed the same images"
                    )
                view.notes.extend(teacher_bD.notes)
            terms = self.terms(view, T_BD, pending)
            factors = {name: 1.0 for name in terms if is_ranking(name)}
            if self.target is not None and ramp * self.weight > 0:
                factors["distillation"] = ramp * self.weight * self.diffusion.temperature**2
            return combine(view, terms, factors, self._checks, also_sum, T_BD)

    def terms(
        self, view: BatchView, T_BD: torch.Tensor | None = None, pending: manifold.PendingTarget | None = None
    ) -> dict[str, PartialMean]:
        """Compute this rank's share of every term, or raise RunError if it cannot solve.

        The ranking loss's parts come first; then what ``distil`` returns, if there is a target; and, of a diffused one,
        ``target_residual`` (mean bound on a row's L1 error), ``target_iterations`` and, with a memory,
        ``target_dropped_mass``.
        """
        terms = self.ranking.partial_means(view)
        if self.target is not None and not self.target.needs_teacher:
            T_BD = view.E_BD.detach()  # whose shape alone is read
        if self.target is None or T_BD is None:
            return terms
        S_bB = view.S_bB[:, view.rows] if self.scope == "rank" else view.S_bB
        T_BD, rows = self._scoped(T_BD, view.rows)
        found = manifold.target_rows(T_BD, rows, self.diffusion, self.memory_MD, pending)
        if self.memory and self.training and torch.is_grad_enabled():  # no rows of a validation pass
            self.memory_MD = torch.cat([T_BD, *([] if self.memory_MD is None else [self.memory_MD])])[: self.memory]
        terms |= distillation.distil(S_bB, found.target_bB, self.diffusion.temperature, rows.start)
        if self.target.graph is not None:
            count = terms["target_entropy"].count
            terms["target_residual"] = PartialMean(found.error_b.sum(), count)
            terms["target_iterations"] = PartialMean(torch.full_like(count, found.iterations), torch.ones_like(count))
            if self.memory:
                dropped = torch.zeros_like(count) if found.dropped_b is None else found.dropped_b.sum()
                terms["target_dropped_mass"] = PartialMean(dropped, count)
        return terms

    def _scoped(self, T_BD: torch.Tensor, rows: slice) -> tuple[torch.Tensor, slice]:
        """Choose the rows that share a manifold, and place the memory beside them."""
        if self.memory_MD is not None:  # a checkpoint brings it on the CPU
            self.memory_MD = self.memory_MD.to(T_BD)
        return (T_BD[rows], slice(0, rows.stop - rows.start)) if self.scope == "rank" else (T_BD, rows)

    def reset_memory(self) -> None:
        """Empty the memory of another teacher's rows, and of what was enough."""
        self.memory_MD, self._plan = None, manifold.QueuePlan()

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, 0) if self.memory_MD is None else self.memory_MD  # safetensors holds no None

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        self.memory_MD = state if state is not None and len(state) else None


def is_ranking(name: str) -> bool:
    """Tell whether a term is the ranking loss or a part of it."""
    return name.partition("_")[0] == "ranking"


def class_indices(labels_B: torch.Tensor, classes_C: torch.Tensor) -> torch.Tensor:
    """Turn class ids [B] into indices of the sorted classes [C], or raise InputError."""
    index_B = torch.searchsorted(classes_C, labels_B).clamp_(max=len(classes_C) - 1)
    unknown_B = classes_C[index_B] != labels_B
    if unknown_B.any():
        raise InputError(f"a batch holds class {int(labels_B[unknown_B][0])}, which is no training class")
    if (index_B == index_B[0]).all():
        raise InputError(
            f"all {len(labels_B)} images of a batch are of class {int(labels_B[0])}; a ranking loss needs two classes, "
            f"so raise batch.global_size or lower batch.samples_per_class"
        )
    return index_B
