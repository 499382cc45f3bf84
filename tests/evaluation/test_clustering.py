"""k-means, NMI and F1: against loops and scikit-learn, and the same bits at 1, 2 and 3 real processes."""

import pytest
import torch

from dist_obdsd.evaluation import clustering
from dist_obdsd.evaluation.clustering import k_means, nmi, pairwise_f1
from dist_obdsd.rng import rng
from tests import harness
from tests.evaluation import data, oracle
from tests.evaluation.data import KINDS, N

K = 11


def worker(kind: str, cells: int, threads: int) -> tuple[list[int], list[list[float]]]:
    """(clusters of all images, centres)."""
    clustering.CELLS = cells
    torch.set_num_threads(threads)
    clusters, centres = k_means(data.rows(kind), K, seed=1)
    torch.set_num_threads(1)
    return clusters.tolist(), centres.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_loops_say_the_same_on_any_ranks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = data.rows(kind)
    drawn = sorted(rng(1, "k-means").permutation(N)[:K].tolist())
    expected, centres = oracle.k_means(rows.double().tolist(), rows.double()[drawn].tolist())
    answers = [
        answer
        for world in harness.WORLD_SIZES
        for cells, threads in ((1 << 22, 1), (1, 1), (100, 2))
        for answer in harness.run(world, worker, kind, cells, threads)
    ]
    assert all(answer == answers[0] for answer in answers)
    assert answers[0][0] == expected
    scale = max(1.0, rows.abs().max().item())
    found, wanted = (torch.tensor(of, dtype=torch.float64) / scale for of in (answers[0][1], centres))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert len(set(expected)) == {"collapsed": 1, "copies": 6}.get(kind, K)
    if kind == "close":  # control: without the second scoring, near ties fall as they like
        monkeypatch.setattr(clustering, "CLOSE", -1.0)
        assert k_means(rows, K, seed=1)[0].tolist() != expected


# ---- what a clustering is worth ----


@pytest.mark.parametrize(
    ("n", "classes", "clusters"), [(50, 5, 5), (200, 30, 4), (200, 4, 30), (60, 1, 7), (60, 7, 1), (30, 30, 3)]
)
def test_nmi_and_f1_against_loops_and_scikit_learn(n: int, classes: int, clusters: int) -> None:
    from sklearn.metrics.cluster import pair_confusion_matrix

    random = torch.Generator().manual_seed(n)
    both = [torch.randint(0, m, (n,), generator=random) for m in (classes, clusters)]
    classes, clusters = (of.tolist() for of in both)
    assert nmi(*both) == pytest.approx(oracle.nmi(classes, clusters), abs=1e-12)
    (_, false), (missed, right) = pair_confusion_matrix(classes, clusters)
    if right + false + missed:
        assert pairwise_f1(*both) == pytest.approx(2 * right / (2 * right + false + missed), abs=1e-12)
    if right:
        assert pairwise_f1(*both) == pytest.approx(oracle.pairwise_f1(classes, clusters), abs=1e-12)


def test_degenerate_clusterings() -> None:
    one, apart = torch.zeros(9, dtype=torch.int64), torch.arange(9)
    assert (nmi(one, one), pairwise_f1(one, one)) == (1.0, 1.0)
    assert (nmi(apart, apart.flip(0)), pairwise_f1(apart, apart.flip(0))) == (1.0, 1.0)
    assert (nmi(apart, one), pairwise_f1(apart, one)) == (0.0, 0.0)
