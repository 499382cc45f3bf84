"""What a few runs say about an arm, and about the difference between two arms. Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LEVEL = 0.95
FEWEST = 3
"""Runs below which no interval and no p-value is given."""


@dataclass(frozen=True)
class Spread:
    """Of n values. What n is too small for is None."""

    n: int
    mean: float
    std: float | None
    """Standard deviation of the sample, sqrt(sum (x - mean)^2 / (n - 1)); needs 2 values."""
    half: float | None
    """Half of the 95 % interval of the mean, t(0.975, n - 1) * std / sqrt(n) with Student's t; needs 3 values."""


@dataclass(frozen=True)
class Difference(Spread):
    """Of paired values: the arm's minus the baseline's, seed by seed."""

    p: float | None
    """Two-sided p-value of the paired t-test; needs 3 pairs that do not all differ by the same."""


def spread(values: Sequence[float]) -> Spread:
    """
    Raises:
        ValueError: there are no values.

    >>> spread([1.0, 2.0, 3.0]).mean
    2.0
    >>> round(spread([1.0, 2.0, 3.0]).half, 4)      # 4.3027 * 1 / sqrt(3)
    2.4841
    """
    n = len(values)
    if not n:
        raise ValueError("a mean needs at least one value")
    mean = math.fsum(values) / n
    if n < 2:
        return Spread(n, mean, None, None)
    std = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1))
    if n < FEWEST:
        return Spread(n, mean, std, None)
    from scipy.stats import t

    return Spread(n, mean, std, float(t.ppf((1 + LEVEL) / 2, n - 1)) * std / math.sqrt(n))


def difference(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Compare two arms on the seeds that both have.

    Args:
        arm: seed -> value.
        baseline: likewise.

    Returns:
        None where they share no seed.
    """
    seeds = sorted(arm.keys() & baseline.keys())
    if not seeds:
        return None
    of = spread([arm[seed] - baseline[seed] for seed in seeds])
    p = None
    # Where all differ by the same, t is infinite or 0 / 0: rounding would decide what the test says.
    if of.n >= FEWEST and of.std is not None and of.std > 1e-12 * max(abs(arm[seed]) for seed in seeds):
        from scipy.stats import ttest_rel

        p = float(ttest_rel([arm[seed] for seed in seeds], [baseline[seed] for seed in seeds]).pvalue)
    return Difference(of.n, of.mean, of.std, of.half, p)
