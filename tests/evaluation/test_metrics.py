"""The worked examples beside the metrics."""

import doctest
from types import ModuleType

import pytest

from dist_obdsd.evaluation import clustering, geometry, metrics


@pytest.mark.parametrize(("module", "examples"), [(metrics, 12), (clustering, 3), (geometry, 2)])
def test_the_worked_examples(module: ModuleType, examples: int) -> None:
    outcome = doctest.testmod(module)
    assert outcome.attempted >= examples
    assert outcome.failed == 0
