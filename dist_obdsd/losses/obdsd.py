"""The objective: ranking loss plus self-distillation, from this rank's rows and the gathered batch.

    loss = ranking(E, labels) + ramp * weight * temperature^2 * KL( target || softmax(E E^T / temperature) )

(arXiv 2211.07566). Every rank computes its own rows against all columns and hands on sums and counts, never means: the
ranks may keep different numbers of anchors, and a mean of their means is another loss.

Legend: b rows of this rank, B rows of the global batch, M of the memory, D embedding dimension, W ranks.
"""

from collections.abc import Mapping
from typing import Any

import torch

from dist_obdsd.config.registry import TARGETS
from dist_obdsd.distributed.collectives import AsyncAllGather
from dist_obdsd.errors import InputError
from dist_obdsd.losses import distillation
from dist_obdsd.losses.base import RankingLoss
from dist_obdsd.losses.batch_view import BatchView, PartialMean
from dist_obdsd.manifold import targets as manifold
from dist_obdsd.manifold.diffusion import Diffusion
from dist_obdsd.manifold.similarity import check_rows


class Objective:
    """The ranking loss with its own parameters, the target and the manifold's memory."""

    def __init__(
        self,
        ranking: RankingLoss,
        diffusion: Diffusion | None,
        *,
        weight: float = 1.0,
        scope: str = "global",
        memory: int = 0,
    ) -> None:
        """
        Args:
            diffusion: the target and its parameters; None trains without distillation.
            weight: of the distillation.
            scope: ``global``, or ``rank`` for a target over each rank's own part of the batch.
            memory: rows of earlier batches that the diffusion also runs over.
        """
        self.ranking, self.diffusion = ranking, diffusion
        self.weight, self.scope, self.memory = weight, scope, memory
        self.target = None if diffusion is None else TARGETS.load(diffusion.target)
        self.memory_MD: torch.Tensor | None = None
        """The teacher's rows of this epoch's latest batches, newest first; the same on every rank."""

    def start_async(self, teacher: AsyncAllGather, rows: slice) -> manifold.PendingTarget | None:
        """Queue the diffusion before the student's forward pass, for ``terms``; see ``manifold.start_async``.

        Args:
            teacher: the teacher's unit rows of all ranks. They are waited for only where the diffusion can start early.
            rows: this rank's.
        """
        b, own = rows.stop - rows.start, self.scope == "rank"
        nodes = (b if own else teacher.B) + self.memory
        if self.diffusion is None or not manifold.can_start_async(b, nodes, self.diffusion):
            return None
        T_BD = teacher.wait()
        if own:
            T_BD, rows = T_BD[rows], slice(0, b)
        return manifold.start_async(T_BD, rows, self.diffusion, self.memory_MD)

    def terms(
        self, view: BatchView, T_BD: torch.Tensor | None = None, pending: manifold.PendingTarget | None = None
    ) -> dict[str, PartialMean]:
        """Compute this rank's share of every term.

        The names and their order are the same on every rank. All hang on ``E_BD`` or are without gradient: the
        backward of its gather is a collective, so a rank without a single anchor must enter it, too.

        Args:
            view: the student's rows.
            T_BD: the teacher's unit rows; their D may differ. Left out where ``needs_teacher`` says so.
            pending: what ``start_async`` returned for them, if it was called.

        Returns:
            The ranking loss's parts first, named ``ranking`` or ``ranking_...``; ``distillation`` if there is a target;
            then those that are only logged: ``target_entropy``, ``target_kl_to_uniform``, ``target_self_mass``,
            ``target_defects`` and, of a diffused target, ``target_residual`` (mean bound on a row's L1 error),
            ``target_iterations`` and, with a memory, ``target_dropped_mass``.

        Raises:
            InputError: if shapes do not fit.
            RunError: if the diffusion cannot be solved.
        """
        terms = self.ranking(view)
        rows = view.rows
        if self.target is not None and not self.target.needs_teacher:
            T_BD = view.E_BD.detach()  # the uniform target reads its shape alone
        if self.diffusion is None or self.target is None or T_BD is None:
            return terms
        check_rows("T_BD", T_BD, view.B, 2)
        S_bB = view.S_bB
        if self.scope == "rank":
            S_bB, T_BD, rows = S_bB[:, rows], T_BD[rows], slice(0, view.b)
        found = manifold.target_rows(T_BD, rows, self.diffusion, self.memory_MD, pending)
        self._remember(T_BD)
        terms |= distillation.distil(S_bB, found.target_bB, self.diffusion.temperature, rows.start)
        if self.target.graph is not None:
            count = terms["target_entropy"].count
            terms["target_residual"] = PartialMean(found.error_b.sum(), count)
            terms["target_iterations"] = PartialMean(torch.full_like(count, found.iterations), torch.ones_like(count))
            if self.memory:
                dropped = count.new_zeros(()) if found.dropped_b is None else found.dropped_b.sum()
                terms["target_dropped_mass"] = PartialMean(dropped, count)
        return terms

    def ramp(self, epoch: int, epochs: int) -> float:
        """Return epoch / epochs, where ``epoch`` counts from 0: the first epoch has no distillation."""
        return epoch / epochs

    def needs_teacher(self, ramp: float) -> bool:
        """Tell whether ``terms`` needs the teacher, whose forward is skipped while it has no effect."""
        return self.target is not None and self.target.needs_teacher and ramp * self.weight > 0

    def loss(
        self, terms: Mapping[str, PartialMean], global_counts: Mapping[str, torch.Tensor], world_size: int, ramp: float
    ) -> torch.Tensor:
        """Compute the scalar on which this rank calls backward; its mean over the ranks is the global loss.

        With the gathered rows' gradients summed over the ranks, rank r's parameter gradient is that of everyone's loss
        through r's rows. DDP then takes the mean over the W ranks. So each term enters as local_sum * W / global_count,
        and what DDP makes is exactly d(global_sum / global_count), as in one process with the whole batch. The same
        holds for the ranking loss's own parameters, whose gradients are averaged, too.

        Args:
            global_counts: each term's count, summed over the ranks. A count of 0 gives a loss and a gradient of 0.

        Raises:
            InputError: if the ramp asks for distillation and ``terms`` had no teacher.
        """
        factors = {name: 1.0 for name in terms if is_ranking(name)}
        scale = 0.0 if self.diffusion is None else ramp * self.weight * self.diffusion.temperature**2
        if scale > 0:
            if "distillation" not in terms:
                raise InputError(f"the ramp is {ramp} but the terms hold no distillation; give T_BD to terms()")
            factors["distillation"] = scale
        sums_n = torch.stack([terms[name].sum for name in factors])
        # A count may be a share of 1 where every rank computes the whole loss; 0 means that nothing counts.
        counts_n = torch.stack([global_counts[name] for name in factors]).to(sums_n.dtype)
        # Fills take their number along; a tensor made of numbers would be a copy to the GPU that the host waits for.
        factors_n = torch.stack([sums_n.new_full((), factor * world_size) for factor in factors.values()])
        return sums_n @ (factors_n / (counts_n + (counts_n == 0)))

    # ---- memory -----------------------------------------------------------------------------------------------------

    def _remember(self, T_BD: torch.Tensor) -> None:
        if self.memory:
            known = [] if self.memory_MD is None else [self.memory_MD]
            self.memory_MD = torch.cat([T_BD, *known])[: self.memory]

    def forget(self) -> None:
        """Empty the memory: another teacher's rows would not fit those of the next one."""
        self.memory_MD = None

    def state_dict(self) -> dict[str, Any]:
        """Return the checkpoint's entries: the ranking loss's parameters and the memory."""
        return {"objective": self.ranking.state_dict(), "manifold_memory": self.memory_MD}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore what ``state_dict`` gave."""
        self.ranking.load_state_dict(state["objective"])
        memory_MD = state["manifold_memory"]
        self.memory_MD = None if memory_MD is None else memory_MD.to(device)


def is_ranking(name: str) -> bool:
    """Tell whether a term is the ranking loss or a part of it."""
    return name.partition("_")[0] == "ranking"


def class_indices(labels_B: torch.Tensor, classes_C: torch.Tensor) -> torch.Tensor:
    """Turn class ids [B], on the CPU, into indices 0 to C-1 among the sorted training classes [C].

    Raises:
        InputError: a label is no training class, or the batch has fewer than two classes.
    """
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
