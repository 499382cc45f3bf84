"""Per-query metrics against loops."""

import doctest

import pytest
import torch

from dist_obdsd.errors import InputError
from dist_obdsd.evaluation import metrics
from dist_obdsd.evaluation.metrics import map_at_k, map_at_r, r_precision, recall_at_k
from tests.evaluation import oracle


def ranked(queries: int, width: int, density: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    relevant = torch.rand(queries, width, generator=random) < density
    return relevant, torch.randint(1, width + 1, (queries,), generator=random)


def test_the_worked_examples() -> None:
    outcome = doctest.testmod(metrics)
    assert outcome.attempted >= 8
    assert outcome.failed == 0


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
def test_each_query_is_what_a_loop_says(density: float) -> None:
    relevant, counts = ranked(200, 12, density, seed=1)
    share = r_precision(relevant, counts)
    at_5, at_12, divided = (map_at_k(relevant, counts, *more) for more in ((5,), (12,), (12, counts + 1)))
    for query, (row, r) in enumerate(zip(relevant.tolist(), counts.tolist(), strict=True)):
        assert share[query].item() == oracle.r_precision(row, r)
        assert at_5[query].item() == oracle.average_precision(row, 5, min(r, 5))
        assert at_12[query].item() == oracle.average_precision(row, 12, r)
        assert divided[query].item() == oracle.average_precision(row, 12, r + 1)
    recall, precision = recall_at_k(relevant, (1, 3, 12)), map_at_r(relevant, counts)
    for query, (row, r) in enumerate(zip(relevant.tolist(), counts.tolist(), strict=True)):
        assert precision[query].item() == oracle.average_precision_at_r(row, r)
        for k in (1, 3, 12):
            assert recall[k][query].item() == oracle.recall(row, k)


def test_a_value_does_not_depend_on_the_queries_beside_it() -> None:
    relevant, counts = ranked(1000, 40, 0.4, seed=2)
    together = map_at_r(relevant, counts)
    assert torch.equal(together, torch.cat([map_at_r(relevant[i : i + 1], counts[i : i + 1]) for i in range(1000)]))
    # Control: what lies beyond R must not count, and does in the average precision of the whole list.
    assert not torch.equal(together, map_at_r(relevant, torch.full_like(counts, 40)))


def test_perfect_and_hopeless() -> None:
    assert map_at_r(torch.ones(2, 5, dtype=torch.bool), torch.tensor([5, 2])).tolist() == [1.0, 1.0]
    assert map_at_r(torch.zeros(2, 5, dtype=torch.bool), torch.tensor([5, 2])).tolist() == [0.0, 0.0]
    assert recall_at_k(torch.zeros(0, 5, dtype=torch.bool), (1,))[1].shape == (0,)
    assert map_at_r(torch.zeros(0, 5, dtype=torch.bool), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_too_few_neighbours_are_refused_with_the_number_needed() -> None:
    relevant = torch.ones(3, 4, dtype=torch.bool)
    with pytest.raises(InputError, match=r"Recall@8 .* 1 to 4"):
        recall_at_k(relevant, (1, 8))
    with pytest.raises(InputError, match="Recall@0"):
        recall_at_k(relevant, (0,))
    with pytest.raises(InputError, match=r"needs 6 neighbours.* 4 were searched"):
        map_at_r(relevant, torch.tensor([2, 6, 1]))
    with pytest.raises(InputError, match=r"mAP@1000 needs 1000 neighbours.* 4 were searched"):
        map_at_k(relevant, torch.tensor([2, 3, 1]), 1000)
    with pytest.raises(InputError, match=r"R-precision needs 6"):
        r_precision(relevant, torch.tensor([2, 6, 1]))
    for metric in (map_at_r, r_precision, lambda relevant, counts: map_at_k(relevant, counts, 4)):
        with pytest.raises(InputError, match="2 queries without a match"):
            metric(relevant, torch.tensor([0, 3, 0]))
        assert metric(relevant[:0], torch.zeros(0, dtype=torch.int64)).shape == (0,)
