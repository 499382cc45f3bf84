"""The objective: ranking loss plus self-distillation, from this rank's rows and the gathered batch.

    loss = ranking(E, labels) + ramp * weight * temperature^2 * KL( target || softmax(E E^T / temperature) )

(arXiv 2211.07566). Every rank computes its own rows against all columns and hands on sums and counts, never means: the
ranks may keep different numbers of anchors, and a mean of their means is another loss.

Legend: b rows of this rank, B rows of the global batch, D embedding dimension, W ranks.
"""

from collections.abc import Mapping

import torch

from dist_obdsd import config
from dist_obdsd.errors import InputError
from dist_obdsd.objective import distillation, manifold
from dist_obdsd.objective.ranking import MultiSimilarity
from dist_obdsd.objective.terms import Term, View, check_rows


class Objective:
    def __init__(self, ranking: config.Ranking, distillation: config.Distillation) -> None:
        if not isinstance(ranking, config.MultiSimilarity):
            raise InputError(f"ranking.name={ranking.name} is not in yet; set ranking.name=multi_similarity")
        self.ranking, self.distillation = MultiSimilarity(ranking), distillation

    def terms(
        self,
        E_bD: torch.Tensor,
        E_BD: torch.Tensor,
        labels_B: torch.Tensor,
        first_row: int,
        T_BD: torch.Tensor | None = None,
    ) -> dict[str, Term]:
        """This rank's share of every term.

        The names and their order are the same on every rank. All hang on ``E_BD`` or are without gradient: the
        backward of its gather is a collective, so a rank without a single anchor must enter it, too.

        Args:
            E_bD: the student's unit rows of this rank.
            E_BD: those of all ranks, in rank order, with gradient.
            labels_B: integer class of each row.
            first_row: where this rank's rows begin in the batch.
            T_BD: the teacher's unit rows; their D may differ. Left out where ``needs_teacher`` says so.

        Returns:
            ``ranking`` first; ``distillation`` if there is a target; then those that are only logged: the target's
            ``target_entropy``, ``target_kl_to_uniform``, ``target_self_mass`` and, of a diffused target,
            ``target_residual`` (mean bound on a row's L1 error).

        Raises:
            InputError: if shapes do not fit.
            RunError: if the diffusion cannot be solved.
        """
        view = View(E_bD, E_BD, labels_B, first_row)
        rows, B = view.rows, view.B
        terms = self.ranking(view)
        settings = self.distillation
        if not settings.needs_teacher:
            T_BD = E_BD.detach()  # the uniform target reads its shape alone
        if settings.target == "none" or T_BD is None:
            return terms
        check_rows("T_BD", T_BD, B, 2)
        solve = manifold.target_rows(
            T_BD, rows, target=settings.target, temperature=settings.temperature,
            transition_temperature=settings.transition_temperature, omega=settings.omega, mask_self=settings.mask_self,
        )  # fmt: skip
        terms["distillation"] = distillation.kl_term(E_bD, E_BD, solve.target_bB, settings.temperature)
        terms |= distillation.target_statistics(solve.target_bB, first_row)
        if settings.target in ("obdsd", "obdsd_symmetric"):
            terms["target_residual"] = Term(solve.residual_b.sum(), terms["target_entropy"].count)
        return terms

    def ramp(self, epoch: int, epochs: int) -> float:
        """epoch / epochs, where ``epoch`` counts from 0: the first epoch has no distillation."""
        return epoch / epochs

    def needs_teacher(self, ramp: float) -> bool:
        """Whether ``terms`` needs the teacher's embeddings: its forward is skipped while it would have no effect."""
        return self.distillation.needs_teacher and ramp * self.distillation.weight > 0

    def loss(
        self, terms: Mapping[str, Term], global_counts: Mapping[str, torch.Tensor], world_size: int, ramp: float
    ) -> torch.Tensor:
        """The scalar on which this rank calls backward; its mean over the ranks is the global loss.

        With the gathered rows' gradients summed over the ranks, rank r's parameter gradient is that of everyone's loss
        through r's rows. DDP then takes the mean over the W ranks. So each term enters as local_sum * W / global_count,
        and what DDP makes is exactly d(global_sum / global_count), as in one process with the whole batch.

        Args:
            global_counts: each term's count, summed over the ranks. A count of 0 gives a loss and a gradient of 0.

        Raises:
            InputError: if the ramp asks for distillation and ``terms`` had no teacher.
        """
        factors = {"ranking": 1.0}
        settings = self.distillation
        scale = ramp * settings.weight * settings.temperature**2
        if settings.target != "none" and scale > 0:
            if "distillation" not in terms:
                raise InputError(f"the ramp is {ramp} but the terms hold no distillation; give T_BD to terms()")
            factors["distillation"] = scale
        total = terms["ranking"].sum.new_zeros(())
        for name, factor in factors.items():
            term = terms[name]
            count = global_counts[name].to(term.sum).clamp(min=1)
            total = total + term.sum * (factor * world_size / count)
        return total
