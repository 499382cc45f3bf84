"""Mean, interval and paired test of a metric over seeds. Pure."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

FEWEST = 3
"""Values below which no interval and no p-value is given."""


@dataclass(frozen=True)
class Spread:
    """Mean of n values and its uncertainty; None where n is too small."""

    n: int
    mean: float
    std: float | None
    """Standard deviation of the sample, sqrt(sum (x - mean)^2 / (n - 1)); needs 2 values."""
    half: float | None
    """Half of the mean's 95 % interval by Student's t; needs 3 values."""
    p: float | None
    """Two-sided p-value of the paired t-test; needs 3 differences that are not all the same. None for a plain mean."""


def spread(values: Sequence[float]) -> Spread:
    """Estimate the mean of at least one value.

    >>> spread([1.0, 2.0, 3.0]).mean
    2.0
    >>> round(spread([1.0, 2.0, 3.0]).half, 4)      # 4.3027 * 1 / sqrt(3)
    2.4841
    """
    return replace(_paired(values, [0.0] * len(values)), p=None)


def difference(variant: Mapping[int, float], baseline: Mapping[int, float]) -> Spread | None:
    """Compare two variants, seed -> value, on the seeds that both have.

    Returns:
        The mean of variant - baseline, with the paired t-test; None where they share no seed.
    """
    seeds = sorted(variant.keys() & baseline.keys())
    if not seeds:
        return None
    return _paired([variant[seed] for seed in seeds], [baseline[seed] for seed in seeds])


def _paired(values: Sequence[float], others: Sequence[float]) -> Spread:
    differences = [a - b for a, b in zip(values, others, strict=True)]
    n = len(differences)
    mean = statistics.fmean(differences)
    std = statistics.stdev(differences) if n > 1 else None
    if n < FEWEST or std is None:
        return Spread(n, mean, std, None, None)
    # Where all differ by the same, t is infinite or 0 / 0: rounding would decide what the test says.
    if std <= 1e-12 * max(map(abs, (*values, *others))):
        return Spread(n, mean, std, 0.0, None)
    from scipy.stats import ttest_rel

    test = ttest_rel(values, others)
    interval = test.confidence_interval(0.95)
    return Spread(n, mean, std, float(interval.high - interval.low) / 2, float(test.pvalue))
