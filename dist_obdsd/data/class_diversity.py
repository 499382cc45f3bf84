"""How well the classes are mixed over the batches. Pure: a plan in, numbers out.

Letters: B rows of a batch, K images of one class in a group, G = B/K groups in a batch, C classes.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from dist_obdsd.config import BatchConfig, DataConfig
from dist_obdsd.data.manifest import Manifest
from dist_obdsd.data.schedule import EpochPlan, plan_epoch
from dist_obdsd.errors import InputError


@dataclass(frozen=True)
class Mixing:
    """Distinct classes in a batch, on average over an epoch."""

    distinct: float
    shuffled: float
    """What the epoch's groups would give in a perfectly random order. A class then often stands in a batch twice."""
    most: int
    """What no order can exceed: min(G, C)."""

    @property
    def share(self) -> float:
        """Of the most: the harder of the two comparisons."""
        return self.distinct / self.most

    def __str__(self) -> str:
        return (
            f"{self.distinct:.1f} distinct classes in a batch, {self.share:.1%} of the most possible ({self.most}; "
            f"a perfect shuffle would give {self.shuffled:.1f})"
        )


def mixing_of(plan: EpochPlan, samples_per_class: int) -> Mixing:
    """Count the classes of every batch of a plan.

    The expectation in random order is that of drawing G of the epoch's N groups: a class with m of them is missing
    with probability C(N - m, G) / C(N, G).
    """
    labels_SG = plan.labels_SB[:, ::samples_per_class]
    G, N = labels_SG.shape[1], labels_SG.size
    groups = Counter(labels_SG.ravel().tolist())
    missing = sum(times * _none_drawn(N, m, G) for m, times in Counter(groups.values()).items())
    distinct = sum(len(set(row)) for row in labels_SG.tolist()) / plan.steps
    return Mixing(distinct, len(groups) - missing, min(G, len(groups)))


def _none_drawn(N: int, m: int, G: int) -> float:
    """The probability that none of m marked things is among G that are drawn of N."""
    if N - m < G:
        return 0.0
    log = math.lgamma(N - m + 1) + math.lgamma(N - G + 1) - math.lgamma(N - m - G + 1) - math.lgamma(N + 1)
    return math.exp(log)


def describe(manifest: Manifest) -> str:
    """One line on the mixing with the default batch, lanes and window, and the K that the data was packed for."""
    if not manifest.splits.get("train"):
        return "class mixing: there are no training images"
    K, lanes, window = manifest.samples_per_class, _default(DataConfig, "lanes"), _default(DataConfig, "window")
    # The multiple of what the lanes take that is nearest to the default batch.
    B = max(1, round(_default(BatchConfig, "global_size") / (K * lanes))) * K * lanes
    config = f"batches of {B} ({K} per class, {lanes} lanes, windows of {window} shards)"
    sizes: dict[str, Any] = {"global_size": B, "samples_per_class": K, "lanes": lanes, "window": window}
    try:
        plan = plan_epoch(manifest, manifest.class_ids("train"), seed=0, epoch=0, **sizes)
    except InputError:
        return f"class mixing: the training images are too few for {config}; `dist-obdsd doctor CONFIG` says what fits"
    return f"class mixing: {mixing_of(plan, K)}, with {config}"


def _default(section: type[BatchConfig] | type[DataConfig], name: str) -> int:
    return int(section.model_fields[name].default)
