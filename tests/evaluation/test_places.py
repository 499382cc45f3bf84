"""Places by counting against sorted lists of everything: the same on any number of ranks, or left to the search."""

import contextlib
import functools
import unittest.mock
from typing import Any

import pytest
import torch

from dist_obdsd.distributed import collectives
from dist_obdsd.evaluation import places, retrieval, scores
from dist_obdsd.evaluation.places import count_places
from tests import harness
from tests.evaluation import oracle, test_measure

N, D, C, K = 160, 9, 12, 20
CASES = ("random", "double", "clustered", "close", "copies", "binary", "equal")


@functools.cache
def data(case: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rows [N, D], classes [N] of different sizes, whether they are in the gallery)."""
    random = torch.Generator().manual_seed(CASES.index(case))
    classes = torch.randint(0, C * C, (N,), generator=random).double().sqrt().long()
    x = torch.randn(N, D, generator=random, dtype=torch.float64 if case == "double" else torch.float32)
    if case == "clustered":
        x = torch.randn(C, D, generator=random)[classes] + x
    if case == "close":  # apart by less than float32 sums can tell
        x = torch.ones(N, D) + 3e-7 * x
    if case == "copies":
        x = x[:30].repeat(6, 1)[:N]
    if case == "binary":  # many exact ties between different rows
        return (x > 0).float(), classes, torch.rand(N, generator=random) < 0.8
    if case == "equal":
        x = torch.ones(N, D)
    return torch.nn.functional.normalize(x), classes, torch.rand(N, generator=random) < 0.8


@functools.cache
def expected(case: str, distance: str) -> tuple[dict[int, list[bool]], dict[int, float]]:
    """Query -> whether the first K are of its class, and the best score; queries that have something to find."""
    x, classes, offered = data(case)
    rows, labels = x.double().tolist(), classes.tolist()
    gallery = [i for i in range(N) if offered[i]]
    lists = oracle.nearest(rows, range(N), [rows[i] for i in gallery], gallery, N, distance=distance)
    relevant = {query: [labels[i] == labels[query] for _, i in near] for query, near in lists.items()}
    asked = [query for query in relevant if any(relevant[query])]
    return {query: relevant[query][:K] for query in asked}, {query: lists[query][0][0] for query in asked}


@contextlib.contextmanager
def small(**more: int) -> Any:
    """Several blocks, tiles and samples of the few images here."""
    with contextlib.ExitStack() as changes:
        for name, value in ({"BLOCK": 50, "ROWS": 16, "TILE": 33, "SAMPLED": 2} | more).items():
            changes.enter_context(unittest.mock.patch.object(places, name, value))
        yield


def worker(
    case: str, distance: str, layout: str, crowd: int, close: int
) -> list[tuple[int, list[bool], float, float, bool]]:
    """(query, relevant, best, error, sure) of this rank's queries."""
    x, classes, offered = data(case)
    world, rank = collectives.world_size(), collectives.rank()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(9))
    mine = order[rank::world] if layout == "even" else order[N if rank < world - 1 else 0 :]
    asked = torch.tensor(list(expected(case, distance)[0]))
    queries, gallery = mine[torch.isin(mine, asked)], mine[offered[mine]]
    with small(CROWD=crowd, CLOSE=close):
        found = count_places(x[queries], queries, x[gallery], gallery, classes, offered, K, distance)
    return list(zip(queries.tolist(), *(column.tolist() for column in vars(found).values()), strict=True))


EVERYTHING = (10**9, 10**9)  # nothing is left to the search


def agree(lines: list[tuple[int, list[bool], float, float, bool]], case: str, distance: str) -> int:
    """Check what is certain; how many queries that are."""
    relevant, best = expected(case, distance)
    assert sorted(line[0] for line in lines) == sorted(relevant)
    for query, of_query, score, error, sure in lines:
        if sure:
            assert of_query == relevant[query]
            assert abs(score - best[query]) <= error
    return sum(line[-1] for line in lines)


@pytest.mark.parametrize("distance", scores.DISTANCES)
@pytest.mark.parametrize("case", CASES)
def test_places_are_those_of_the_sorted_list(case: str, distance: str) -> None:
    queries = len(expected(case, distance)[0])
    assert agree(worker(case, distance, "even", *EVERYTHING), case, distance) == queries
    certain = agree(worker(case, distance, "even", 3, 5), case, distance)
    assert certain > 0.9 * queries if case in ("random", "double", "clustered") else certain < queries


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(("case", "layout"), [("close", "even"), ("binary", "even"), ("clustered", "last")])
def test_any_number_of_ranks_counts_the_same(world: int, case: str, layout: str) -> None:
    answers = harness.run(world, worker, case, "euclidean", layout, *EVERYTHING)
    lines = [line for of_rank in answers for line in of_rank]
    assert agree(lines, case, "euclidean") == len(lines)
    alone = worker(case, "euclidean", "even", *EVERYTHING)
    assert [line[:2] for line in sorted(lines)] == [line[:2] for line in sorted(alone)]


def test_a_guess_that_is_too_high_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = places._Counting._guess
    monkeypatch.setattr(places._Counting, "_guess", lambda *given: original(*given) + 0.6)
    assert agree(worker("random", "cosine", "even", 3, 5), "random", "cosine") == 0


def test_a_coarse_matrix_product_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the library took a coarser type for float32, as TF32 and bfloat16 are."""
    multiply = torch.mm

    def coarse(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        return multiply(a.bfloat16().float(), b.bfloat16().float(), out=out)

    monkeypatch.setattr(torch, "mm", coarse)
    assert agree(worker("random", "cosine", "even", *EVERYTHING), "random", "cosine") == 0
    # Control: where the bound is not held against it, the places are wrong.
    monkeypatch.setattr(places, "error_bound", lambda rows, *_: rows.new_full((len(rows),), 0.004).double())
    monkeypatch.setattr(places, "scores_of_pairs", coarse_pairs)
    with pytest.raises(AssertionError):
        agree(worker("close", "cosine", "even", *EVERYTHING), "close", "cosine")


def coarse_pairs(rows: torch.Tensor, gallery: torch.Tensor, *rest: Any) -> torch.Tensor:
    return scores.scores_of_pairs(rows.bfloat16().double(), gallery.bfloat16().float(), *rest)


def test_rows_beyond_float32_are_left_to_the_search() -> None:
    x = 1e30 * torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    numbers, classes = torch.arange(50), torch.arange(50) % 5
    found = count_places(x, numbers, x, numbers, classes, torch.ones(50, dtype=torch.bool), 9)
    assert not found.sure_q.any()


# ---- in an evaluation ----


def measured_worker(kind: str, layout: str, conventions: str, close: int) -> tuple[dict[str, Any], int]:
    """(what an evaluation finds, how many queries were listed for their places)."""
    listed = []
    original = retrieval._Search.neighbours

    def counting(search: Any, some_q: torch.Tensor, k: int, scored: int) -> Any:
        listed.append(int(some_q.sum()) if scored == 1 else 0)
        return original(search, some_q, k, scored)

    with contextlib.ExitStack() as changes:
        changes.enter_context(small(CLOSE=close))
        changes.enter_context(unittest.mock.patch.multiple(retrieval, MANY=1, FEW=2))
        changes.enter_context(unittest.mock.patch.object(retrieval._Search, "neighbours", counting))
        found = test_measure.measure_all_worker(kind, layout, conventions, "torch")
    return found, sum(listed)


@pytest.mark.parametrize("conventions", ["correct", "released"])
@pytest.mark.parametrize("kind", test_measure.KINDS)
def test_an_evaluation_by_counting_has_the_bits_of_one_by_lists(kind: str, conventions: str) -> None:
    lists = test_measure.measure_all_worker(kind, "even", conventions, "faiss")
    for close in (0, 10**9):
        found, listed = measured_worker(kind, "shuffled", conventions, close)
        assert found == lists
        assert listed > 0  # the largest classes, at least
        assert listed < found["queries"] or close == 0


def test_an_evaluation_by_counting_on_two_ranks() -> None:
    for kind, layout in (("ties", "even"), ("cameras", "last")):
        lists = test_measure.measure_all_worker(kind, "even", "correct", "faiss")
        for found, _ in harness.run(2, measured_worker, kind, layout, "correct", 5):
            assert found == lists
