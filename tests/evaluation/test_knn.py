"""The search against a double loop, whatever the library, the threads, and the queries and rows beside each other."""

import functools
import itertools
import sys
from typing import Any

import pytest
import torch

from dist_obdsd.errors import InputError
from dist_obdsd.evaluation import knn, knn_backends
from dist_obdsd.evaluation.knn import Gallery
from tests.evaluation import oracle

N, D, K = 160, 9, 5
CASES = ("random", "double", "clustered", "equal", "copies", "duplicates", "binary", "close", "sparse", "unnormalised")
Found = dict[int, tuple[tuple[float, ...], tuple[int, ...]]]


@functools.cache
def data(case: str) -> torch.Tensor:
    """Rows [N, D]."""
    random = torch.Generator().manual_seed(CASES.index(case))
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
        return (x > 0).float()
    if case == "close":  # apart by less than float32 sums can tell
        x = torch.ones(N, D) + 3e-7 * x
    if case == "sparse":  # zero rows, and half of the scores exactly 0
        x = x * (torch.rand(N, D, generator=random) < 0.15)
    if case == "unnormalised":
        return x * 10.0 ** torch.randint(-3, 4, (N, 1), generator=random)
    return torch.nn.functional.normalize(x)


@functools.cache
def expected(case: str, distance: str = "cosine") -> Found:
    rows, numbers = data(case).double().tolist(), range(N)
    found = oracle.nearest(rows, numbers, rows, numbers, K, distance=distance)
    return {query: (tuple(s for s, _ in best), tuple(i for _, i in best)) for query, best in found.items()}


def nearest(gallery: Gallery, x: torch.Tensor, own: torch.Tensor, k: int = K, **options: Any) -> Found:
    found = gallery.search(x, own, k, exact=k, **options)
    scores, neighbours = (torch.cat(parts).tolist() for parts in zip(*found, strict=True))
    return {i: (tuple(s), tuple(f)) for i, s, f in zip(own.tolist(), scores, neighbours, strict=True)}


def whole(case: str, backend: str = "torch", distance: str = "cosine", **options: Any) -> Found:
    x = data(case)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(options.get("block", 0)))
    return nearest(Gallery(x, K, backend=backend, distance=distance), x[order], order, **options)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("case", CASES)
def test_the_double_loop_by_any_library_and_threads(case: str, distance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, first = expected(case, distance), whole(case, "faiss", distance)
    scale = float(data(case).double().norm(dim=1).max()) ** 2
    for query, (scores, ids) in wanted.items():
        assert first[query][0] == pytest.approx(scores, abs=1e-14 * scale)
        # A loop that adds up in another order may tell other rows apart in the last bit.
        gaps = [a - b for a, b in itertools.pairwise(scores)]
        if all(gap == 0 or gap > 1e-14 * scale for gap in gaps) and case not in ("close", "unnormalised"):
            assert first[query][1] == ids
    for backend, block, threads in (("torch", 7, 2), ("faiss", 64, 2), ("torch", 64, 1)):
        torch.set_num_threads(threads)
        assert whole(case, backend, distance, block=block) == first
        torch.set_num_threads(1)
    monkeypatch.setattr(knn_backends, "MANY", 1)  # with float64 products
    assert whole(case, "auto", distance) == first


def test_without_the_second_scoring_lists_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn.Gallery, "_rescore", lambda *_: None)
    assert {i: ids for i, (_, ids) in whole("close").items()} != {i: ids for i, (_, ids) in expected("close").items()}


def test_copies_without_the_limit_take_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    build = knn.build_backend

    def counting(*arguments: Any) -> Any:
        find, rounding = build(*arguments)
        return lambda rows, c: (asked.append(c), find(rows, c))[1], rounding

    monkeypatch.setattr(knn, "build_backend", counting)
    assert whole("equal") == expected("equal")
    assert max(asked) < N
    monkeypatch.setattr(Gallery, "_without_surplus_copies", property(lambda self: (self, torch.arange(N))))
    assert whole("equal") == expected("equal")
    assert max(asked) == N


def test_no_queries_and_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    x = data("random")
    assert all(not len(scores) for scores, _ in Gallery(x, K).search(x[:0], torch.arange(0), K))
    monkeypatch.setattr(knn_backends, "TILE", 11)
    monkeypatch.setattr(knn, "PAIRS", 7)
    assert whole("binary") == expected("binary")


def test_queries_outside_the_gallery_find_k_of_exactly_k() -> None:
    x = data("random")
    found = nearest(Gallery(x[-4:], 4, backend="torch"), x[:3], torch.tensor([-1, -1, -1]), 4)
    assert all(sorted(row) == [0, 1, 2, 3] for _, row in found.values())
    everyone = nearest(Gallery(x, N - 1), x, torch.arange(N), N - 1)
    assert all(len({*row, query}) == N for query, (_, row) in everyone.items())


@pytest.mark.parametrize("D", [1, 2, 7, 128])
def test_a_fixed_sum_does_not_follow_the_shape(D: int) -> None:
    x = torch.randn(300, D, dtype=torch.float64, generator=torch.Generator().manual_seed(D))
    whole = knn.fixed_sum(x)
    torch.testing.assert_close(whole, x.sum(1), rtol=1e-12, atol=1e-12)
    assert torch.equal(torch.cat([knn.fixed_sum(x[:7]), knn.fixed_sum(x[7:])]), whole)


def test_unit_rows_of_any_length() -> None:
    x = data("random").double() * torch.logspace(-150, 200, N, dtype=torch.float64)[:, None]
    x[3] = 0
    unit = knn.unit_rows(x)
    assert torch.equal(unit[3], x[3])
    torch.testing.assert_close(unit.norm(dim=1), (torch.arange(N) != 3).double())


def test_auto_does_without_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert whole("binary", backend="auto") == expected("binary")
    with pytest.raises(InputError, match="evaluation.backend=torch"):
        whole("binary", backend="faiss")
