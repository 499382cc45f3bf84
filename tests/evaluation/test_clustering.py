"""k-means, NMI and F1: against loops and scikit-learn, and the same bits at 1, 2 and 3 real processes."""

import functools

import pytest
import torch

from dist_obdsd.evaluation import clustering
from dist_obdsd.evaluation.clustering import k_means, nearest_centre, nmi, pairwise_f1
from dist_obdsd.rng import rng
from tests import harness
from tests.evaluation import oracle

N, D = 120, 5
KINDS = ("random", "unit", "float64", "duplicates", "grid", "collapsed", "nearly collapsed", "huge", "one group")


@functools.cache
def data(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows [N, D], classes)."""
    random = torch.Generator().manual_seed(KINDS.index(kind))
    classes = torch.arange(N) * 7 % 11
    rows = torch.randn(11, D, generator=random)[classes] + 0.5 * torch.randn(N, D, generator=random)
    if kind == "unit":
        rows = torch.nn.functional.normalize(rows)
    if kind == "float64":
        rows = rows.double() + 1e-12 * torch.randn(N, D, dtype=torch.float64, generator=random)
    if kind == "duplicates":
        rows = rows[torch.arange(N) % 6]  # fewer points than clusters, so some clusters must stay empty
    if kind == "grid":
        rows = (rows * 2).round() / 2  # so coarse that many distances tie
    if kind == "collapsed":
        rows = torch.full_like(rows, 0.3)
    if kind == "nearly collapsed":
        rows = 0.3 + (rows * 4).round() * 2.0**-24
    if kind == "huge":
        rows = rows.double() * 1e10
    if kind == "one group":
        classes = torch.zeros_like(classes)
    return rows, classes


def worker(kind: str, k: int, cells: int, threads: int) -> tuple[list[int], list[list[float]]]:
    """(clusters of all images, centres)."""
    clustering.CELLS = cells
    torch.set_num_threads(threads)
    clusters, centres = k_means(data(kind)[0], k, seed=1)
    torch.set_num_threads(1)
    return clusters.tolist(), centres.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_loops_say_the_same_on_any_ranks(kind: str) -> None:
    rows, _ = data(kind)
    k = 11
    drawn = sorted(rng(1, "k-means").permutation(N)[:k].tolist())
    expected, centres = oracle.k_means(rows.double().tolist(), rows.double()[drawn].tolist())
    first = None
    for world in harness.WORLD_SIZES:
        for cells, threads in ((1 << 22, 1), (1, 1), (100, 2)):
            for answer in harness.run(world, worker, kind, k, cells, threads):
                first = first or answer
                assert answer == first
    assert first is not None
    if kind != "nearly collapsed":  # where sums in another order tell other rows apart
        assert first[0] == expected
    scale = max(1.0, rows.abs().max().item())
    found, wanted = (torch.tensor(of, dtype=torch.float64) / scale for of in (first[1], centres))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6 if kind == "nearly collapsed" else 1e-12)
    assert len(set(expected)) == {"collapsed": 1, "duplicates": 6}.get(kind, 11)


@pytest.mark.parametrize("kind", KINDS)
def test_the_nearest_centre(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = data(kind)
    centres = rows[:40].double() * 1.01
    expected = [of.index(max(of)) for of in scores(rows, centres)]
    found = nearest_centre(rows, rows.double().norm(dim=1), centres).tolist()
    if kind not in ("huge", "nearly collapsed"):
        assert found == expected
    if kind == "grid":  # control: without the second scoring, ties fall as they like
        monkeypatch.setattr(clustering, "CLOSE", -1.0)
        assert nearest_centre(rows, rows.double().norm(dim=1), centres).tolist() != expected


def scores(rows: torch.Tensor, centres: torch.Tensor) -> list[list[float]]:
    return [[oracle.score(row, c) - oracle.score(c, c) / 2 for c in centres.tolist()] for row in rows.double().tolist()]


# ---- what a clustering is worth ----


def clusterings() -> list[tuple[list[int], list[int]]]:
    random = torch.Generator().manual_seed(4)
    cases = []
    for n, classes, clusters in ((50, 5, 5), (200, 30, 4), (200, 4, 30), (60, 1, 7), (60, 7, 1), (30, 30, 3)):
        cases.append([torch.randint(0, m, (n,), generator=random).tolist() for m in (classes, clusters)])
    cases.append([list(range(20)), list(range(20))[::-1]])  # as good as equal
    return [(a, b) for a, b in cases]


@pytest.mark.parametrize(("classes", "clusters"), clusterings())
def test_nmi_and_f1_against_loops_and_scikit_learn(classes: list[int], clusters: list[int]) -> None:
    from sklearn.metrics.cluster import pair_confusion_matrix

    both = torch.tensor(classes), torch.tensor(clusters)
    assert nmi(*both) == pytest.approx(oracle.nmi(classes, clusters), abs=1e-12)
    (_, false), (missed, right) = pair_confusion_matrix(classes, clusters)
    if right + false + missed:
        assert pairwise_f1(*both) == pytest.approx(2 * right / (2 * right + false + missed), abs=1e-12)
    if right:
        assert pairwise_f1(*both) == pytest.approx(oracle.pairwise_f1(classes, clusters), abs=1e-12)


def test_degenerate_clusterings() -> None:
    one, apart = torch.zeros(9, dtype=torch.int64), torch.arange(9)
    assert (nmi(one, one), pairwise_f1(one, one)) == (1.0, 1.0)
    assert (nmi(apart, apart), pairwise_f1(apart, apart)) == (1.0, 1.0)
    assert (nmi(apart, one), pairwise_f1(apart, one)) == (0.0, 0.0)
