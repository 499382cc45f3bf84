"""The distributed search against a double loop, however the images are spread over ranks, threads and libraries."""

import functools
import itertools
import sys
from typing import Any

import pytest
import torch

from dist_obdsd.distributed import collectives
from dist_obdsd.errors import InputError
from dist_obdsd.evaluation import knn, knn_backends
from dist_obdsd.evaluation.knn import Gallery
from tests import harness
from tests.evaluation import oracle

N, D, K = 160, 9, 5
CASES = ("random", "double", "clustered", "equal", "copies", "duplicates", "binary", "close", "sparse", "unnormalised")
Found = dict[int, tuple[tuple[float, ...], tuple[int, ...]]]
WORLDS = harness.MORE_WORLD_SIZES


@functools.cache
def data(case: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [N, D] and their ids, which are neither dense nor sorted."""
    random = torch.Generator().manual_seed(CASES.index(case))
    ids = torch.randperm(5 * N, generator=random)[:N]
    x = torch.randn(N, D, generator=random, dtype=torch.float64 if case == "double" else torch.float32)
    if case == "clustered":
        x = torch.randn(N // 10, D, generator=random).repeat(10, 1) + 0.1 * x
    if case == "equal":  # a collapsed network
        x = torch.ones(N, D)
    if case == "copies":  # more copies of a row than there are spare candidates
        x = x[:4].repeat(N // 4, 1)
    if case == "duplicates":  # one image in twenty is there twice
        x[: N // 20] = x[N // 20 : 2 * (N // 20)]
    if case == "binary":  # many exact ties between different rows
        return (x > 0).float(), ids
    if case == "close":  # apart by less than float32 sums can tell
        x = torch.ones(N, D) + 3e-7 * x
    if case == "sparse":  # zero rows, and half of the scores exactly 0
        x = x * (torch.rand(N, D, generator=random) < 0.15)
    if case == "unnormalised":
        return x * 10.0 ** torch.randint(-3, 4, (N, 1), generator=random), ids
    return torch.nn.functional.normalize(x), ids


@functools.cache
def expected(case: str, distance: str = "cosine") -> Found:
    x, ids = data(case)
    rows, numbers = x.double().tolist(), ids.tolist()
    found = oracle.nearest(rows, numbers, rows, numbers, K, distance=distance)
    return {query: (tuple(s for s, _ in best), tuple(i for _, i in best)) for query, best in found.items()}


def nearest(gallery: Gallery, x: torch.Tensor, ids: torch.Tensor, k: int = K, **options: Any) -> Found:
    found = gallery.search(x, ids, k, exact=k, **options)
    scores, neighbours = (torch.cat(parts).tolist() for parts in zip(*found, strict=True))
    return {i: (tuple(s), tuple(f)) for i, s, f in zip(ids.tolist(), scores, neighbours, strict=True)}


def alone(case: str, backend: str = "torch", **options: Any) -> Found:
    x, ids = data(case)
    return nearest(Gallery(x, ids, K, backend=backend, **options), x, ids)


def share(total: int, layout: str, order_seed: int) -> torch.Tensor:
    """This rank's rows of a shuffled order: near-equal shares, very different ones, or all on the last rank."""
    world, rank = collectives.world_size(), collectives.rank()
    weights = {
        "even": [1.0] * world,
        "uneven": [4.0**r for r in range(world)],
        "one": [0.0] * (world - 1) + [1.0],
    }[layout]
    cuts = [round(total * sum(weights[:r]) / sum(weights)) for r in range(world + 1)]
    order = torch.randperm(total, generator=torch.Generator().manual_seed(order_seed))
    return order[cuts[rank] : cuts[rank + 1]]


LAYOUTS = [
    ("faiss", 4096, "even", "even", 1),
    ("torch", 7, "even", "uneven", 2),
    ("faiss", 64, "one", "uneven", 2),
    ("torch", 64, "uneven", "one", 1),
]


def search_worker(case: str, distance: str) -> list[Found]:
    x, ids = data(case)
    results = []
    for seed, (backend, block, query_layout, gallery_layout, threads) in enumerate(LAYOUTS):
        queries, gallery = share(N, query_layout, 2 * seed), share(N, gallery_layout, 2 * seed + 1)
        torch.set_num_threads(threads)
        searched = Gallery(x[gallery], ids[gallery], K, distance=distance, backend=backend)
        results.append(nearest(searched, x[queries], ids[queries], block=block))
        torch.set_num_threads(1)
    return results


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("case", CASES)
def test_the_double_loop_on_any_ranks(case: str, distance: str) -> None:
    wanted, first = expected(case, distance), None
    for world in WORLDS:
        of_ranks = harness.run(world, search_worker, case, distance)
        for number, layout in enumerate(LAYOUTS):
            together: Found = {}
            for rank in of_ranks:
                together |= rank[number]
            first = first or together
            assert together == first, (world, layout)
    assert first is not None
    scale = float(data(case)[0].double().norm(dim=1).max()) ** 2
    for query, (scores, ids) in wanted.items():
        assert first[query][0] == pytest.approx(scores, abs=1e-14 * scale)
        # A loop that adds up in another order may tell other rows apart in the last bit.
        gaps = [a - b for a, b in itertools.pairwise(scores)]
        if all(gap == 0 or gap > 1e-14 * scale for gap in gaps) and case not in ("close", "unnormalised"):
            assert first[query][1] == ids


def test_without_the_second_scoring_lists_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn.Gallery, "rescore", lambda self, rows, scores, ids, *rest: (scores, ids))
    assert {i: ids for i, (_, ids) in alone("close").items()} != {i: ids for i, (_, ids) in expected("close").items()}


def test_copies_without_the_limit_take_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    candidates = knn.Gallery.candidates

    def counting(self: Any, rows: torch.Tensor, height: int, c: int) -> Any:
        asked.append(c)
        return candidates(self, rows, height, c)

    monkeypatch.setattr(knn.Gallery, "candidates", counting)
    assert alone("equal") == expected("equal")
    assert max(asked) < N
    monkeypatch.setattr(knn.Gallery, "without_surplus_copies", lambda self: self)
    assert alone("equal") == expected("equal")
    assert max(asked) == N


def test_the_distances_differ_but_for_unit_rows() -> None:
    for case, same in (("double", True), ("sparse", False)):
        ids = [{i: found for i, (_, found) in expected(case, d).items()} for d in ("cosine", "euclidean")]
        assert (ids[0] == ids[1]) == same


def test_no_queries_and_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    x, ids = data("random")
    assert not list(Gallery(x, ids, K).search(x[:0], ids[:0], K))
    monkeypatch.setattr(knn_backends, "TILE", 11)
    monkeypatch.setattr(knn, "PAIRS", 7)
    assert alone("binary") == expected("binary")


def test_queries_outside_the_gallery_find_k_of_exactly_k() -> None:
    x, ids = data("random")
    found = nearest(Gallery(x[-4:], ids[-4:], 4, backend="torch"), x[:3], ids[:3], 4)
    assert all(sorted(row) == sorted(ids[-4:].tolist()) for _, row in found.values())
    everyone = nearest(Gallery(x, ids, N - 1), x, ids, N - 1)
    assert all(len(set(row)) == N - 1 for _, row in everyone.values())


@pytest.mark.parametrize("D", [1, 2, 7, 128])
def test_a_fixed_sum_does_not_follow_the_shape(D: int) -> None:
    x = torch.randn(300, D, dtype=torch.float64, generator=torch.Generator().manual_seed(D))
    whole = knn.fixed_sum(x)
    torch.testing.assert_close(whole, x.sum(1), rtol=1e-12, atol=1e-12)
    assert torch.equal(torch.cat([knn.fixed_sum(x[:7]), knn.fixed_sum(x[7:])]), whole)


def test_unit_rows_of_any_length() -> None:
    x = data("random")[0].double() * torch.logspace(-150, 200, N, dtype=torch.float64)[:, None]
    x[3] = 0
    unit = knn.unit_rows(x)
    assert torch.equal(unit[3], x[3])
    torch.testing.assert_close(unit.norm(dim=1), (torch.arange(N) != 3).double())


def refusal_worker() -> tuple[str, str]:
    x, ids = (of[share(N, "even", 0)] for of in data("random"))
    try:
        list(Gallery(x, ids, N).search(x, ids, N))
    except InputError as error:
        return type(error).__name__, str(error)
    raise AssertionError("not refused")


@pytest.mark.parametrize("world", harness.WORLD_SIZES)
def test_more_neighbours_than_there_are_are_refused(world: int) -> None:
    answers = harness.run(world, refusal_worker)
    assert len(set(answers)) == 1
    assert all(fact in answers[0][1] for fact in (f"k={N}", str(N - 1)))


def test_auto_does_without_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert alone("binary", backend="auto") == expected("binary")
    with pytest.raises(InputError, match="evaluation.backend=torch"):
        alone("binary", backend="faiss")
