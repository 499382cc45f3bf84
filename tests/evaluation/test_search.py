"""The distributed search against a double loop: same ids and the same bits of every score, however it is spread out."""

import contextlib
import functools
import sys
import unittest.mock
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_obdsd.distributed import collectives
from dist_obdsd.errors import InputError, RunError
from dist_obdsd.evaluation import proposers, scores, search
from dist_obdsd.evaluation.search import nearest
from tests import harness
from tests.evaluation import oracle

N, D, K = 160, 9, 5
CASES = ("random", "double", "clustered", "equal", "copies", "binary", "close", "sparse", "unnormalised")
Found = dict[int, tuple[tuple[float, ...], tuple[int, ...]]]
worlds = pytest.mark.parametrize("world", harness.WORLD_SIZES)


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
    if case == "binary":  # many exact ties between different rows
        return (x > 0).float(), ids
    if case == "close":  # apart by less than float32 sums can tell
        x = torch.ones(N, D) + 3e-7 * x
    if case == "sparse":  # zero rows, and half of the scores exactly 0
        x = x * (torch.rand(N, D, generator=random) < 0.15)
    if case == "unnormalised":
        return x * 10.0 ** torch.randint(-25, 25, (N, 1), generator=random), ids
    return torch.nn.functional.normalize(x), ids


@functools.cache
def expected(case: str, exclude_self: bool = True, distance: str = "cosine") -> Found:
    x, ids = data(case)
    rows, numbers = x.double().tolist(), ids.tolist()
    found = oracle.nearest(rows, numbers, rows, numbers, K, exclude_self, distance)
    return {query: (tuple(s for s, _ in best), tuple(i for _, i in best)) for query, best in found.items()}


def as_found(ids: torch.Tensor, neighbours: search.Neighbours) -> Found:
    scores, found = neighbours.scores_qs.tolist(), neighbours.ids_qk.tolist()
    return {i: (tuple(s), tuple(f)) for i, s, f in zip(ids.tolist(), scores, found, strict=True)}


def alone(case: str, backend: str = "torch", **options: Any) -> Found:
    x, ids = data(case)
    return as_found(ids, nearest(x, ids, x, ids, K, backend=backend, **options))


def share(total: int, layout: str, order_seed: int) -> torch.Tensor:
    """This rank's rows of a shuffled order: near-equal shares, very different ones, or all on the last rank."""
    world, rank = collectives.world_size(), collectives.rank()
    weights = {
        "even": [1.0] * world,
        "uneven": [4.0**r for r in range(world)],
        "one": [0.0] * (world - 1) + [1.0],
        "first": [1.0] + [0.0] * (world - 1),
    }[layout]
    cuts = [round(total * sum(weights[:r]) / sum(weights)) for r in range(world + 1)]
    order = torch.randperm(total, generator=torch.Generator().manual_seed(order_seed))
    return order[cuts[rank] : cuts[rank + 1]]


def search_worker(case: str, layouts: list[tuple[str, int, str, str]], distance: str) -> list[Found]:
    x, ids = data(case)
    results = []
    for seed, (backend, block, query_layout, gallery_layout) in enumerate(layouts):
        queries, gallery = share(N, query_layout, 2 * seed), share(N, gallery_layout, 2 * seed + 1)
        own, part = ids[queries], ids[gallery]
        arguments = (x[queries], own, x[gallery], part, K)
        options = {"backend": backend, "block": block, "distance": distance}
        with contextlib.ExitStack() as changes:
            if (
                seed % 2
            ):  # as for many neighbours: float64 from the start; and nothing in between that and the full scan
                changes.enter_context(unittest.mock.patch.object(proposers, "MANY", 1))
                changes.enter_context(unittest.mock.patch.object(search, "ENLARGED", 1))
            found = nearest(*arguments, **options)
            assert torch.equal(nearest(*arguments, **options, scored=0).ids_qk, found.ids_qk)
        results.append(as_found(own, found))
    return results


@worlds
@pytest.mark.parametrize("distance", scores.DISTANCES)
@pytest.mark.parametrize("case", CASES)
def test_same_ids_and_bits_as_the_double_loop(world: int, case: str, distance: str) -> None:
    layouts = [
        ("faiss", 4096, "even", "even"),
        ("torch", 4096, "even", "even"),
        ("faiss", 7, "uneven", "even"),
        ("torch", 7, "even", "uneven"),
        ("faiss", 64, "one", "uneven"),
        ("torch", 64, "first", "one"),
        ("auto", 64, "uneven", "one"),
    ]
    of_ranks = harness.run(world, search_worker, case, layouts, distance)
    for number, setting in enumerate(layouts):
        together: Found = {}
        for rank in of_ranks:
            together |= rank[number]
        assert together == expected(case, distance=distance), setting


def test_the_distances_differ_but_for_unit_rows() -> None:
    assert ids_alone(expected("double")) == ids_alone(expected("double", distance="euclidean"))
    assert ids_alone(expected("sparse")) != ids_alone(expected("sparse", distance="euclidean"))


def ids_alone(found: Found) -> dict[int, tuple[int, ...]]:
    return {query: ids for query, (_, ids) in found.items()}


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 70), levels=st.integers(1, 3), wide=st.booleans(),
       distance=st.sampled_from(scores.DISTANCES))  # fmt: skip
def test_rows_of_few_values_tie_in_every_way(seed: int, n: int, levels: int, wide: bool, distance: str) -> None:
    random = torch.Generator().manual_seed(seed)
    x = torch.randint(0, levels, (n, 3), generator=random).float() + 3e-7 * wide * torch.rand(n, 3, generator=random)
    ids, k = torch.randperm(3 * n, generator=random)[:n], 1 + seed % (n - 1)
    rows = x.double().tolist()
    of_loop = oracle.nearest(rows, ids.tolist(), rows, ids.tolist(), k, distance=distance)
    wanted = {query: (tuple(s for s, _ in best), tuple(i for _, i in best)) for query, best in of_loop.items()}
    for many in (1, 1000):
        with unittest.mock.patch.object(proposers, "MANY", many), unittest.mock.patch.object(search, "MARGIN", 2):
            assert as_found(ids, nearest(x, ids, x, ids, k, distance=distance, backend="torch")) == wanted


def test_without_scores_few_pairs_are_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    def counting(rows: Any, gallery: Any, query_p: torch.Tensor, *rest: Any) -> torch.Tensor:
        scored.append(query_p.numel())
        return original(rows, gallery, query_p, *rest)

    original, scored = search.scores_of_pairs, []
    monkeypatch.setattr(search, "scores_of_pairs", counting)
    monkeypatch.setattr(proposers, "MANY", 1)
    x, ids = data("random")
    everything = nearest(x, ids, x, ids, K)
    for some in (0, 3):
        found = nearest(x, ids, x, ids, K, scored=some)
        assert torch.equal(found.ids_qk, everything.ids_qk)
        assert torch.equal(found.scores_qs, everything.scores_qs[:, :some])
    assert scored == [N * K, N * search.CHECKED, N * 3]


def uneven_backends_worker() -> Found:
    """Rank 0 proposes in float32, the others in float64."""
    x, ids = data("close")
    queries, gallery = share(N, "even", 0), share(N, "even", 1)
    with unittest.mock.patch.object(proposers, "MANY", 1 if collectives.rank() else 1000):
        return as_found(ids[queries], nearest(x[queries], ids[queries], x[gallery], ids[gallery], K, backend="torch"))


def test_ranks_may_propose_in_different_precision() -> None:
    together: Found = {}
    for found in harness.run(2, uneven_backends_worker):
        together |= found
    assert together == expected("close")


def test_no_queries_anywhere() -> None:
    x, ids = data("random")
    found = nearest(x[:0], ids[:0], x, ids, K)
    assert found.scores_qs.shape == found.ids_qk.shape == (0, K)


def test_the_image_itself_is_left_out_by_id_and_not_by_score() -> None:
    with_self = alone("copies", exclude_self=False)
    assert with_self == expected("copies", exclude_self=False)
    assert with_self != expected("copies")
    # Copies share the score of the image itself, so dropping the first place would keep the image for most queries.
    kept = sum(query in found[1:] for query, (_, found) in with_self.items())
    assert kept > 0
    assert not any(query in found for query, (_, found) in alone("copies").items())


def test_queries_outside_the_gallery_find_k_of_exactly_k() -> None:
    x, ids = data("random")
    found = nearest(x[:3], ids[:3], x[-4:], ids[-4:], 4, backend="torch")
    assert all(sorted(row) == sorted(ids[-4:].tolist()) for row in found.ids_qk.tolist())


def test_small_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proposers, "TILE", 11)
    monkeypatch.setattr(proposers, "ROWS", 7)
    assert alone("clustered") == expected("clustered")
    assert alone("binary") == expected("binary")


def no_bound(rows: torch.Tensor, *_: Any) -> torch.Tensor:
    return rows.new_full((rows.shape[0],), -1.0, dtype=torch.float64)


def believe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every proposal for certain."""
    original = search._Search.propose
    monkeypatch.setattr(
        search._Search,
        "propose",
        lambda self, rows, *rest: (original(self, rows, *rest)[0], torch.ones(len(rows), dtype=torch.bool)),
    )


@pytest.mark.parametrize("case", ["equal", "binary", "close"])
def test_without_the_error_bound_ties_come_out_wrong(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "error_bound", no_bound)
    assert alone(case) == expected(case)  # distrusting every proposal is slow but right
    believe(monkeypatch)
    assert alone(case) != expected(case)


def test_a_backend_of_less_than_float32_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = proposers.torch_proposer

    def careless(rows: torch.Tensor, dtype: torch.dtype, distance: scores.Distance) -> proposers.Proposer:
        if dtype == torch.float64:
            return exact(rows, dtype, distance)
        return exact(rows.bfloat16().float(), dtype, distance)  # as a matrix unit rounds its inputs

    monkeypatch.setattr(proposers, "torch_proposer", careless)
    assert alone("clustered") == expected("clustered")
    assert ids_without_scores("clustered") == ids_alone(expected("clustered"))
    # Control: with a bound that finds nothing out, and nothing proposed to spare, they do change the result.
    monkeypatch.setattr(search, "MARGIN", 0)
    monkeypatch.setattr(search, "error_bound", no_bound)
    believe(monkeypatch)
    assert alone("clustered") != expected("clustered")


def ids_without_scores(case: str) -> dict[int, tuple[int, ...]]:
    x, ids = data(case)
    found = nearest(x, ids, x, ids, K, backend="torch", scored=0).ids_qk
    return {query: tuple(row) for query, row in zip(ids.tolist(), found.tolist(), strict=True)}


def test_ordinary_embeddings_need_no_full_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("a full scan of ordinary data")

    monkeypatch.setattr(search._Search, "scan", never)
    assert alone("random") == expected("random")
    assert alone("binary") == expected("binary")  # more candidates are enough
    monkeypatch.setattr(search, "ENLARGED", 1)
    with pytest.raises(AssertionError, match="full scan"):
        alone("binary")


@pytest.mark.parametrize("distance", scores.DISTANCES)
def test_a_library_dot_product_has_other_bits(distance: str) -> None:
    """Why scores are summed in a fixed order: the same pairs, scored by one matrix product, differ in the last bits."""
    x, _ = data("random")
    columns, x_Dn = x.double().T.contiguous(), x.T.contiguous()
    fixed = scores.scores_of_all(columns, x_Dn, distance)
    library = x.double() @ x.double().T if distance == "cosine" else -(torch.cdist(x.double(), x.double()) ** 2)
    assert not torch.equal(fixed, library)
    torch.testing.assert_close(fixed, library, atol=1e-12, rtol=0)
    queries, some = torch.tensor([5, 5, 9]), torch.tensor([3, 140, 7])
    assert torch.equal(scores.scores_of_pairs(columns, x_Dn, queries, some, distance), fixed[queries, some])
    assert fixed[2, 4].item() == oracle.score(x[2].tolist(), x[4].tolist(), distance)


@pytest.mark.parametrize("distance", scores.DISTANCES)
@pytest.mark.parametrize("case", CASES)
def test_the_error_bound_holds_and_is_not_idle(case: str, distance: str) -> None:
    x, _ = data(case)
    exact = scores.scores_of_all(x.double().T.contiguous(), x.T.contiguous(), distance)
    largest = float(x.double().norm(dim=1).max())
    for dtype in (torch.float32, torch.float64):
        queries, gallery = (scores.rough_rows(x.to(dtype), distance, query=query) for query in (True, False))
        rough = (queries @ gallery.T).double() + scores.rough_offset(x, distance)[:, None]
        bound = scores.error_bound(x, largest, dtype, distance)
        ok = bound.isfinite()
        assert ok.any() or (case, distance, dtype) == ("unnormalised", "euclidean", torch.float32)
        assert ((rough - exact).abs()[ok] <= bound[ok, None]).all()
        if case == "random":
            assert ((rough - exact).abs().amax(dim=1) > bound / 100).any()


def test_unit_rows_have_the_same_bits_in_any_share() -> None:
    x = data("unnormalised")[0].clone()
    x[3] = 0
    unit = scores.unit_rows(x)
    assert torch.equal(torch.cat([scores.unit_rows(x[:7]), scores.unit_rows(x[7:])]), unit)
    assert torch.equal(unit[3], x[3])
    expected_norms = torch.ones(N, dtype=torch.float64)
    expected_norms[3] = 0
    torch.testing.assert_close(unit.double().norm(dim=1), expected_norms, atol=1e-6, rtol=0)


# ---- faiss on a GPU is tried by a process of its own ----


def test_a_probe_that_crashes_hangs_or_complains_is_a_reason_and_no_more() -> None:
    assert "signal 6" in proposers.gpu_fault(0, "import os; os.abort()")
    assert "did not end within" in proposers.gpu_fault(0, "import time; time.sleep(60)", seconds=0.5)
    assert "exit code 1 (no kernel image)" in proposers.gpu_fault(0, "import sys; sys.exit('no kernel image')")
    assert proposers.gpu_fault(0, "pass") == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_the_probe_itself_runs_and_finds_no_gpu() -> None:
    assert "faiss sees 0 GPUs" in proposers.gpu_fault(0)


def test_faiss_threads_are_those_of_torch_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import faiss

    calls = []
    plain = faiss.omp_set_num_threads
    before, of_torch = faiss.omp_get_max_threads(), torch.get_num_threads()
    plain(2)
    # faiss and torch may load the same OpenMP library, in which case torch now says 2 as well.
    wanted = torch.get_num_threads()
    monkeypatch.setattr(faiss, "omp_set_num_threads", lambda n: (calls.append(n), plain(n)))
    alone("random", backend="faiss")
    after = faiss.omp_get_max_threads()
    plain(before)
    assert calls == [wanted, 2]
    assert after == 2
    assert torch.get_num_threads() == of_torch


# ---- what is refused: the same sentence on every rank, and the group can go on ----


def refusal_worker(fault: str) -> tuple[str, str]:
    rank, last = collectives.rank(), collectives.rank() == collectives.world_size() - 1
    x, ids = data("random")
    own = share(N, "even", 0)
    x, ids, k, backend = x[own].clone(), ids[own].clone(), K, "torch"
    hidden = sys.modules.get("faiss")
    if fault == "k":
        k = N
    elif fault == "nan" and last:
        x[3, 1], x[5, 0] = torch.nan, torch.inf
    elif fault == "twice" and last:
        ids[0] = ids[1]
    elif fault == "backend":
        backend = "annoy"
    elif fault == "types":
        x = x.double() if last else x
    elif fault == "no faiss" and last:
        backend = "faiss"
        sys.modules["faiss"] = None  # type: ignore[assignment]
    try:
        nearest(x, ids, x, ids, k, backend=backend)
    except (InputError, RunError) as error:
        return type(error).__name__, str(error)
    finally:
        if hidden is not None:
            sys.modules["faiss"] = hidden
        else:
            sys.modules.pop("faiss", None)
    raise AssertionError(f"rank {rank} was not refused")


@worlds
@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("k", "InputError", [f"k={N}", str(N - 1)]),
        ("nan", "RunError", ["2 of", "NaN or infinite", "image id"]),
        ("twice", "RunError", [f"{N} images", f"{N - 1} different ids"]),
        ("backend", "InputError", ["annoy", "auto, faiss or torch"]),
        ("no faiss", "InputError", ["evaluation.backend=torch", "install faiss"]),
    ],
)
def test_refused_alike_on_every_rank(world: int, fault: str, kind: str, words: list[str]) -> None:
    answers = harness.run(world, refusal_worker, fault)
    assert len(set(answers)) == 1
    assert answers[0][0] == kind
    assert all(word in answers[0][1] for word in words), answers[0][1]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_that_differ_in_type_are_told(world: int) -> None:
    answers = harness.run(world, refusal_worker, "types")
    assert len(set(answers)) == 1
    assert "differs" in answers[0][1]
    assert "float64" in answers[0][1]


def test_auto_does_without_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert alone("clustered", backend="auto") == expected("clustered")


def test_a_k_of_all_others_is_not_refused() -> None:
    x, ids = data("copies")
    found = nearest(x, ids, x, ids, N - 1)
    assert all(np.unique(row).size == N - 1 for row in found.ids_qk.numpy())
