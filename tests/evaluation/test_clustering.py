"""k-means, NMI and F1: against loops and scikit-learn, and the same bits at 1, 2 and 3 real processes."""

import doctest
import functools

import pytest
import torch

from dist_obdsd.distributed import collectives
from dist_obdsd.errors import InputError
from dist_obdsd.evaluation import clustering
from dist_obdsd.evaluation.clustering import contingency, k_means, nearest_centre, nmi, pairwise_f1
from dist_obdsd.rng import rng
from tests import harness
from tests.evaluation import oracle

N, D = 120, 5
KINDS = ("random", "unit", "float64", "duplicates", "grid", "collapsed", "nearly collapsed", "huge", "one group")
LAYOUTS = ("even", "last", "shuffled", "by class")


@functools.cache
def data(kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rows [N, D], ids, classes), by ascending id; ids have gaps."""
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
        rows = rows.double() * 1e30
    if kind == "one group":
        classes = torch.zeros_like(classes)
    return rows, torch.arange(N) * 3 + 5, classes


def own(layout: str) -> torch.Tensor:
    rank, world = collectives.rank(), collectives.world_size()
    if layout == "even":
        return torch.arange(rank, N, world)
    if layout == "last":
        return torch.arange(N if rank == world - 1 else 0)
    if layout == "by class":
        return (torch.arange(N) * 7 % 11).argsort(stable=True).chunk(world)[rank]
    return torch.randperm(N, generator=torch.Generator().manual_seed(3))[rank::world]


def worker(kind: str, layout: str, k: int, cells: int) -> tuple[list[tuple[int, int]], list[list[float]], dict]:
    """(id and cluster of this rank's images, centres, contingency table)."""
    rows, ids, classes = data(kind)
    mine = own(layout)
    clustering.CELLS = cells
    found = k_means(rows[mine], ids[mine], k, seed=1)
    table = contingency(classes[mine], found.cluster_n)
    return list(zip(ids[mine].tolist(), found.cluster_n.tolist(), strict=True)), found.centres_kD.tolist(), table


@pytest.mark.parametrize("kind", KINDS)
def test_loops_say_the_same_and_no_rank_nor_layout_changes_a_bit(kind: str) -> None:
    rows, ids, classes = data(kind)
    k = 11
    drawn = sorted(rng(1, "k-means").permutation(N)[:k].tolist())
    expected, centres = oracle.k_means(rows.double().tolist(), rows.double()[drawn].tolist())
    first = None
    for world in harness.WORLD_SIZES:
        for layout, cells in zip(LAYOUTS, (1 << 22, 1, 100, 1000), strict=True):
            answers = harness.run(world, worker, kind, layout, k, cells)
            clusters = dict(sorted(pair for pairs, _, _ in answers for pair in pairs))
            for _, found, table in answers:
                answer = list(clusters.values()), found, table
                first = first or answer
                assert answer == first
    assert first is not None
    assert list(clusters) == ids.tolist()
    assert first[0] == expected
    scale = max(1.0, rows.abs().max().item())
    assert (torch.tensor(first[1], dtype=torch.float64) / scale).flatten().tolist() == pytest.approx(
        (torch.tensor(centres, dtype=torch.float64) / scale).flatten().tolist(), abs=1e-12
    )
    assert first[2] == dict(sorted(oracle.Counter(zip(classes.tolist(), expected, strict=True)).items()))
    used = len(set(expected))
    assert used == {"collapsed": 1, "duplicates": 6}.get(kind, 11)


def test_the_seed_and_the_ids_choose_the_start() -> None:
    rows, ids, _ = data("random")
    first = k_means(rows, ids, 11, seed=1).cluster_n
    assert torch.equal(first, k_means(rows.flip(0), ids.flip(0), 11, seed=1).cluster_n.flip(0))
    assert not torch.equal(first, k_means(rows, ids, 11, seed=2).cluster_n)
    assert not torch.equal(first, k_means(rows, ids.flip(0), 11, seed=1).cluster_n)


def test_k_means_lowers_what_it_minimises() -> None:
    rows, ids, _ = data("random")
    spread = []
    for iterations in (0, 1, 20):
        found = k_means(rows, ids, 11, seed=1, iterations=iterations)
        spread.append((rows.double() - found.centres_kD[found.cluster_n]).square().sum().item())
    assert spread[0] > spread[1] > spread[2]


@pytest.mark.parametrize("kind", ["random", "unit"])
def test_a_coarse_matrix_product_is_noticed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the library took a coarser type for float32, as TF32 and bfloat16 are."""
    rows, _, _ = data(kind)
    centres = rows[:40].double() * 1.01
    expected = [of.index(max(of)) for of in scores(rows, centres)]
    multiply = torch.Tensor.__matmul__
    asked = []

    def coarse(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        asked.append(a.dtype)
        if a.dtype == torch.float32:
            a, b = a.to(torch.float8_e4m3fn).float(), b.to(torch.float8_e4m3fn).float()
        return multiply(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", coarse)
    assert nearest_centre(rows, centres).tolist() == expected
    assert torch.float32 in asked
    # Control: the coarse product alone would have been wrong.
    rough = coarse(rows.float(), centres.float().T) - centres.float().square().sum(1) / 2
    assert rough.argmax(1).tolist() != expected


def scores(rows: torch.Tensor, centres: torch.Tensor) -> list[list[float]]:
    return [[oracle.score(row, c) - oracle.score(c, c) / 2 for c in centres.tolist()] for row in rows.double().tolist()]


def refusal_worker(k: int) -> str:
    rows, ids, _ = data("random")
    mine = own("last")
    with pytest.raises(InputError) as raised:
        k_means(rows[mine], ids[mine], k, seed=0)
    return str(raised.value)


@pytest.mark.parametrize("k", [0, N + 1])
def test_more_clusters_than_images_are_refused_on_every_rank(k: int) -> None:
    for world in harness.WORLD_SIZES:
        for message in harness.run(world, refusal_worker, k):
            assert f"{k} clusters" in message
            assert f"there are {N}" in message


# ---- what a clustering is worth ----


def test_the_worked_examples() -> None:
    outcome = doctest.testmod(clustering)
    assert outcome.attempted >= 3
    assert outcome.failed == 0


def clusterings() -> list[tuple[list[int], list[int]]]:
    random = torch.Generator().manual_seed(4)
    cases = []
    for n, classes, clusters in ((50, 5, 5), (200, 30, 4), (200, 4, 30), (60, 1, 7), (60, 7, 1), (30, 30, 3)):
        cases.append([torch.randint(0, m, (n,), generator=random).tolist() for m in (classes, clusters)])
    cases.append([list(range(20)), list(range(20))[::-1]])  # as good as equal
    return [(a, b) for a, b in cases]


@pytest.mark.parametrize(("classes", "clusters"), clusterings())
def test_nmi_and_f1_against_loops_and_scikit_learn(classes: list[int], clusters: list[int]) -> None:
    from sklearn.metrics import normalized_mutual_info_score
    from sklearn.metrics.cluster import pair_confusion_matrix

    table = contingency(torch.tensor(classes), torch.tensor(clusters))
    assert nmi(table) == pytest.approx(oracle.nmi(classes, clusters), abs=1e-12)
    assert nmi(table) == pytest.approx(normalized_mutual_info_score(classes, clusters), abs=1e-9)
    (_, false), (missed, right) = pair_confusion_matrix(classes, clusters)
    if right + false + missed:
        assert pairwise_f1(table) == pytest.approx(2 * right / (2 * right + false + missed), abs=1e-12)
    if right:
        assert pairwise_f1(table) == pytest.approx(oracle.pairwise_f1(classes, clusters), abs=1e-12)


def test_degenerate_clusterings() -> None:
    one = contingency(torch.zeros(9, dtype=torch.int64), torch.zeros(9, dtype=torch.int64))
    assert (nmi(one), pairwise_f1(one)) == (1.0, 1.0)
    apart = contingency(torch.arange(9), torch.arange(9))
    assert (nmi(apart), pairwise_f1(apart)) == (1.0, 1.0)
    wrong = contingency(torch.arange(9), torch.zeros(9, dtype=torch.int64))
    assert (nmi(wrong), pairwise_f1(wrong)) == (0.0, 0.0)


def test_agrees_with_pytorch_metric_learning_and_scikit_learn_on_real_clusters() -> None:
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from sklearn.metrics import normalized_mutual_info_score

    rows, ids, classes = data("unit")
    found = k_means(rows, ids, 11, seed=0)
    value = nmi(contingency(classes, found.cluster_n))
    assert value == pytest.approx(normalized_mutual_info_score(classes, found.cluster_n), abs=1e-9)
    theirs = AccuracyCalculator(include=("NMI",), kmeans_func=lambda x, k: found.cluster_n, device=torch.device("cpu"))
    assert value == pytest.approx(theirs.get_accuracy(rows, classes)["NMI"], abs=1e-6)
    assert 0.3 < value < 0.99
