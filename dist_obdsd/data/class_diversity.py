"""Class diversity: how many distinct classes stand in a batch. Pure: a plan in, numbers out.

Letters: S steps, K images of one class in a group, G groups in a batch.
"""

from dataclasses import dataclass

import numpy as np

from dist_obdsd.data.schedule import EpochPlan


@dataclass(frozen=True)
class ClassDiversity:
    """Distinct classes in a batch, on average over an epoch."""

    distinct: float
    most: int
    """The number that no order can exceed: groups in a batch, or classes in the epoch if these are fewer."""

    @property
    def share(self) -> float:
        return self.distinct / self.most

    def __str__(self) -> str:
        return f"{self.distinct:.1f} distinct classes in a batch, {self.share:.1%} of the most possible ({self.most})"


def measure_diversity(plan: EpochPlan, samples_per_class: int) -> ClassDiversity:
    """Count the classes of every batch of a plan."""
    labels_SG = plan.labels_SB[:, ::samples_per_class]
    distinct = sum(len(set(row)) for row in labels_SG.tolist()) / plan.steps
    return ClassDiversity(distinct, min(labels_SG.shape[1], len(np.unique(labels_SG))))
