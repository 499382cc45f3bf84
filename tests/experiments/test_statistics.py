import math

import pytest

from dist_obdsd.experiments.statistics import difference, spread

T2 = 4.302652729911275  # Student's t, 97.5 %, 2 degrees of freedom, from the printed tables (4.303)
T4 = 2.7764451051977987  # 4 degrees (2.776)


@pytest.mark.parametrize(
    ("values", "mean", "std", "half"),
    [
        ([0.5], 0.5, None, None),
        ([0.5, 0.7], 0.6, math.sqrt(0.02), None),
        # Deviations -0.02, -0.01, 0.03; their squares sum to 0.0014.
        ([0.80, 0.81, 0.85], 0.82, math.sqrt(0.0014 / 2), T2 * math.sqrt(0.0007 / 3)),
        ([1, 2, 3, 4, 5], 3, math.sqrt(2.5), T4 * math.sqrt(2.5 / 5)),
    ],
)
def test_mean_deviation_and_interval_by_hand(values, mean, std, half) -> None:
    of = spread(values)
    assert (of.n, of.p) == (len(values), None)
    assert (of.mean, of.std, of.half) == tuple(x if x is None else pytest.approx(x) for x in (mean, std, half))


def test_a_paired_test_by_hand() -> None:
    variant, baseline = {0: 0.82, 1: 0.71, 2: 0.94}, {0: 0.80, 1: 0.70, 2: 0.91}
    found = difference(variant, baseline)  # differences 0.02, 0.01, 0.03: mean 0.02, deviation 0.01
    assert (found.n, found.mean, found.std) == (3, pytest.approx(0.02), pytest.approx(0.01))
    assert found.half == pytest.approx(T2 * 0.01 / math.sqrt(3))
    t = 0.02 / (0.01 / math.sqrt(3))
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t * t))  # Student's distribution of 2 degrees, in closed form
    assert difference(variant | {5: 9.0}, baseline | {7: 0.0}) == found  # seeds of one side alone do not count
    assert found.p < 0.1  # not what an unpaired test would say of variants that lie this far apart
    assert difference({0: 1.0}, {1: 1.0}) is None
    assert difference({0: 0.5, 1: 0.7}, {0: 0.4, 1: 0.5}).p is None


def test_equal_differences_have_no_p_value() -> None:
    baseline = {0: 0.1, 1: 0.2, 2: 0.3}
    assert difference(baseline, baseline).p is None
    shifted = {seed: value + 0.1 for seed, value in baseline.items()}  # equal but for rounding
    assert difference(shifted, baseline).p is None
    assert difference(shifted, baseline).mean == pytest.approx(0.1)
