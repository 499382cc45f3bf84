"""Per-query metrics against loops."""

import doctest
from types import ModuleType

import pytest
import torch

from dist_obdsd.evaluation import clustering, geometry, metrics
from dist_obdsd.evaluation.metrics import map_at_1000, map_at_r, r_precision, recall
from tests.evaluation import oracle


def ranked(queries: int, width: int, density: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    relevant = torch.rand(queries, width, generator=random) < density
    return relevant, torch.randint(1, width + 1, (queries,), generator=random)


@pytest.mark.parametrize(("module", "examples"), [(metrics, 12), (clustering, 3), (geometry, 2)])
def test_the_worked_examples(module: ModuleType, examples: int) -> None:
    outcome = doctest.testmod(module)
    assert outcome.attempted >= examples
    assert outcome.failed == 0


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
def test_each_query_is_what_a_loop_says(density: float) -> None:
    relevant, counts = ranked(200, 12, density, seed=1)
    chosen = (recall(recall_at=(1, 3, 12)), map_at_r(), r_precision(), map_at_1000(released=False, k=5))
    found = {name: of for metric in chosen for name, of in metric.values(relevant, counts, counts + 1).items()}
    (divided,) = map_at_1000(released=True, k=12).values(relevant, counts, counts + 1).values()
    for query, (row, r) in enumerate(zip(relevant.tolist(), counts.tolist(), strict=True)):
        assert {name: of[query].item() for name, of in found.items()} == {
            **{f"recall@{k}": oracle.recall(row, k) for k in (1, 3, 12)},
            "map@r": oracle.average_precision(row, r, r),
            "r_precision": oracle.r_precision(row, r),
            "map@5": oracle.average_precision(row, 5, min(r, 5)),
        }
        assert divided[query].item() == oracle.average_precision(row, 12, r + 1)


def test_a_value_does_not_depend_on_the_queries_beside_it() -> None:
    def values(relevant: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return map_at_r().values(relevant, counts, counts)["map@r"]

    relevant, counts = ranked(1000, 40, 0.4, seed=2)
    together = values(relevant, counts)
    assert torch.equal(together, torch.cat([values(relevant[i : i + 1], counts[i : i + 1]) for i in range(1000)]))
    # Control: what lies beyond R must not count, and does in the average precision of the whole list.
    assert not torch.equal(together, values(relevant, torch.full_like(counts, 40)))
    assert values(relevant[:0], counts[:0]).shape == (0,)
