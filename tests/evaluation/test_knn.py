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
from tests.evaluation import data, oracle
from tests.evaluation.data import KINDS, N

K = 5
Found = dict[int, tuple[tuple[float, ...], tuple[int, ...]]]


@functools.cache
def expected(kind: str, distance: str = "cosine") -> Found:
    rows, numbers = data.rows(kind).double().tolist(), range(N)
    found = oracle.nearest(rows, numbers, rows, numbers, K, distance=distance)
    return {query: (tuple(s for s, _ in best), tuple(i for _, i in best)) for query, best in found.items()}


def nearest(gallery: Gallery, x: torch.Tensor, own: torch.Tensor, k: int = K, **options: Any) -> Found:
    found = gallery.search(x, own, k, exact=k, **options)
    scores, neighbours = (torch.cat(parts).tolist() for parts in zip(*found, strict=True))
    return {i: (tuple(s), tuple(f)) for i, s, f in zip(own.tolist(), scores, neighbours, strict=True)}


def whole(kind: str, backend: str = "torch", distance: str = "cosine", **options: Any) -> Found:
    x = data.rows(kind)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(options.get("block", 0)))
    return nearest(Gallery(x, K, backend=backend, distance=distance), x[order], order, **options)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_double_loop_by_any_library_and_threads(kind: str, distance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, first = expected(kind, distance), whole(kind, "faiss", distance)
    scale = float(data.rows(kind).double().norm(dim=1).max()) ** 2
    for query, (scores, ids) in wanted.items():
        assert first[query][0] == pytest.approx(scores, abs=1e-14 * scale)
        # A loop that adds up in another order may tell other rows apart in the last bit.
        gaps = [a - b for a, b in itertools.pairwise(scores)]
        if all(gap == 0 or gap > 1e-14 * scale for gap in gaps) and kind not in ("close", "scales"):
            assert first[query][1] == ids
    for backend, block, threads in (("torch", 7, 2), ("faiss", 64, 2), ("torch", 64, 1)):
        torch.set_num_threads(threads)
        assert whole(kind, backend, distance, block=block) == first
        torch.set_num_threads(1)
    monkeypatch.setattr(knn_backends, "MANY", 1)  # with float64 products
    assert whole(kind, "auto", distance) == first


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
    assert whole("collapsed") == expected("collapsed")
    assert max(asked) < N
    monkeypatch.setattr(Gallery, "_without_surplus_copies", property(lambda self: (self, torch.arange(N))))
    assert whole("collapsed") == expected("collapsed")
    assert max(asked) == N


def test_no_queries_and_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    x = data.rows("random")
    assert all(not len(scores) for scores, _ in Gallery(x, K).search(x[:0], torch.arange(0), K))
    monkeypatch.setattr(knn_backends, "TILE", 11)
    monkeypatch.setattr(knn, "PAIRS", 7)
    assert whole("grid") == expected("grid")


def test_queries_outside_the_gallery_find_k_of_exactly_k() -> None:
    x = data.rows("random")
    found = nearest(Gallery(x[-4:], 4, backend="torch"), x[:3], torch.tensor([-1, -1, -1]), 4)
    assert all(sorted(row) == [0, 1, 2, 3] for _, row in found.values())
    everyone = nearest(Gallery(x, N - 1), x, torch.arange(N), N - 1)
    assert all(len({*row, query}) == N for query, (_, row) in everyone.items())


def test_auto_does_without_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert whole("grid", backend="auto") == expected("grid")
    with pytest.raises(InputError, match="evaluation.backend=torch"):
        whole("grid", backend="faiss")
