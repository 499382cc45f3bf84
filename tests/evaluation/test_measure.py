"""Measuring embeddings that are there: every metric, both conventions, several galleries, failures, bad input."""

import functools
from dataclasses import asdict
from typing import Any

import pytest
import torch

from dist_obdsd.distributed import collectives
from dist_obdsd.errors import InputError, RunError
from dist_obdsd.evaluation import geometry
from dist_obdsd.evaluation.evaluator import EvaluationResult, measure
from dist_obdsd.evaluation.metric_parts import Settings
from dist_obdsd.evaluation.retrieval import SHOWN, SHOWN_NEIGHBOURS
from dist_obdsd.rng import rng
from tests import harness
from tests.evaluation import oracle

N, D, TRAIN_CLASSES = 90, 6, 9
KINDS = ("plain", "float64", "ties", "collapsed", "query/gallery", "cameras", "validation")
ALL = ("recall", "map@r", "r_precision", "map@1000", "map@c", "nmi", "f1", "distances", "rho_spectrum")
RECALL_AT = (1, 2, 4)


@functools.cache
def data(kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str]]:
    """(rows [N, D], ids, labels, roles); classes of 1, 2, 3, ... images."""
    random = torch.Generator().manual_seed(KINDS.index(kind))
    labels = torch.repeat_interleave(torch.arange(13) * 10 - 30, torch.arange(13) + 1)[:N]
    rows = torch.randn(13, D, generator=random)[labels // 10 + 3] + 1.5 * torch.randn(N, D, generator=random)
    if kind == "ties":
        rows = rows.sign() * (1 + (rows.abs() > 2))
    if kind == "collapsed":
        rows = torch.full_like(rows, 7.0)
    rows = torch.nn.functional.normalize(rows.double()) if kind == "float64" else torch.nn.functional.normalize(rows)
    roles = {
        "query/gallery": ["query", "gallery", "gallery", "both"],
        "validation": ["train"],
        "cameras": ["query", "gallery:left", "gallery", "gallery:right-2", "both", "gallery:left"],
    }.get(kind, ["both"])
    roles = (roles * N)[:N]
    roles[0] = roles[0] if len(set(roles)) == 1 else "query"  # the class of one image is asked for, in vain
    order = torch.randperm(N, generator=random)
    return rows[order], 1000 - torch.arange(N), labels[order], [roles[i] for i in order.tolist()]


def own(layout: str) -> torch.Tensor:
    rank, world = collectives.rank(), collectives.world_size()
    if layout == "even":
        return torch.arange(rank, N, world)
    if layout == "last":
        return torch.arange(N if rank == world - 1 else 0)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(8))
    if layout == "repeated":  # every rank also has what the next one has, and its own first image twice
        return torch.cat([order[rank::world], order[(rank + 1) % world :: world], order[rank : rank + 1]])
    return order[rank::world]


def measured(kind: str, layout: str, sample: bool = False, **settings: Any) -> EvaluationResult:
    rows, ids, labels, roles = data(kind)
    mine = own(layout)
    return measure(
        rows[mine] if len(mine) else torch.empty(0, 0), ids[mine], labels[mine], [roles[i] for i in mine.tolist()],
        Settings(recall_at=RECALL_AT, seed=4, train_classes=TRAIN_CLASSES, **settings), sample=sample,
    )  # fmt: skip


def measure_worker(kind: str, layout: str, **settings: Any) -> dict[str, Any]:
    result = asdict(measured(kind, layout, **settings))
    assert result.pop("duplicates") == (N + collectives.world_size() if layout == "repeated" else 0)
    return result | {"seconds": None}


def measure_all_worker(kind: str, layout: str, conventions: str, backend: str) -> dict[str, Any]:
    return measure_worker(kind, layout, metrics=ALL, conventions=conventions, backend=backend)


def expected(kind: str, released: bool) -> tuple[dict[str, float], dict[str, tuple[int, int, int]]]:
    """(metrics, gallery -> (queries, images, excluded)), all by loops."""
    rows, ids, labels, roles = data(kind)
    by_id = dict(zip(ids.tolist(), rows.double().tolist(), strict=True))
    label_of = dict(zip(ids.tolist(), labels.tolist(), strict=True))
    role_of = dict(zip(ids.tolist(), roles, strict=True))
    galleries = {"": ("both", "gallery", "train")}
    if kind == "cameras":
        galleries |= {"left": ("gallery:left",), "right-2": ("gallery:right-2",)}
    metrics: dict[str, float] = {}
    counts = {}
    for name, of in galleries.items():
        found, queries, excluded = oracle.evaluate(
            by_id, label_of, role_of, RECALL_AT, gallery_roles=of, more=True, released=released
        )
        metrics |= {f"{name}/{metric}" if name else metric: value for metric, value in found.items()}
        counts[name] = (queries, sum(role in of for role in roles), excluded)
    order = sorted(range(N), key=lambda i: ids[i])
    plain, classes = rows[order].double().tolist(), labels[order].tolist()
    k = TRAIN_CLASSES if released else 13
    drawn = sorted(rng(4, "k-means").permutation(N)[:k].tolist())
    clusters, _ = oracle.k_means(plain, [plain[i] for i in drawn])
    metrics["nmi"] = oracle.nmi(classes, clusters)
    metrics["f1"] = oracle.pairwise_f1(classes, clusters)
    metrics |= oracle.class_distances(plain, classes, cosine=released)
    metrics["rho_spectrum"] = oracle.rho_spectrum(plain, leave_out=int(released))
    return metrics, counts


@pytest.mark.parametrize("conventions", ["correct", "released"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_metric_is_what_loops_say_on_any_ranks_with_the_same_bits(kind: str, conventions: str) -> None:
    metrics, counts = expected(kind, conventions == "released")
    answers = [
        answer
        for world in harness.MORE_WORLD_SIZES
        for layout, backend in (("even", "faiss"), ("last", "torch"), ("repeated", "torch"))
        for answer in harness.run(world, measure_all_worker, kind, layout, conventions, backend)
    ]
    assert all(answer == answers[0] for answer in answers)
    found = answers[0]
    assert found["metrics"].keys() == metrics.keys()
    for name, value in metrics.items():
        # Square roots of rounding errors, where points coincide, and the rounding of the Gram matrix.
        accuracy = 1e-6 if name == "rho_spectrum" or kind == "collapsed" else 1e-12
        assert found["metrics"][name] == pytest.approx(value, abs=accuracy), name
    assert [found[name] for name in ("queries", "gallery", "excluded")] == [
        sum(of[i] for of in counts.values()) for i in range(3)
    ]
    assert (found["excluded"] > 0) == (conventions == "correct")


def test_recall_by_class_and_the_worst_and_best_queries() -> None:
    rows, ids, labels, roles = data("cameras")
    found = measure_worker("cameras", "even")
    by_id = {
        i: (row, label, role)
        for i, row, label, role in zip(ids.tolist(), rows.double().tolist(), labels.tolist(), roles, strict=True)
    }
    drawn = dict(zip(sorted(by_id), rng(0, "best queries").permutation(N).tolist(), strict=True))
    per_class: dict[tuple[str, int], tuple[int, float]] = {}
    failures, successes = [], []
    for name, of in (("", ("both", "gallery")), ("left", ("gallery:left",)), ("right-2", ("gallery:right-2",))):
        gallery = [i for i, (_, _, role) in by_id.items() if role in of]
        hits: dict[int, list[bool]] = {}
        ranked = []
        largest = max(oracle.Counter(by_id[i][1] for i in gallery).values())
        for query, (row, label, role) in by_id.items():
            if role not in ("both", "query") or not any(by_id[i][1] == label for i in gallery if i != query):
                continue
            near = oracle.nearest([row], [query], [by_id[i][0] for i in gallery], gallery, 99)[query]
            near = near[: max(*RECALL_AT, largest - (name == ""))]  # what recall and MAP@R look at
            right = [by_id[i][1] == label for _, i in near]
            hits.setdefault(label, []).append(right[0])
            first = right.index(True) if True in right else len(right)
            ranked.append((-first, -near[0][0], query, label, near[:SHOWN_NEIGHBOURS]))
        per_class |= {(name, label): (len(of), sum(of) / len(of)) for label, of in sorted(hits.items())}
        best: dict[int, Any] = {}
        for line in sorted(ranked, key=lambda line: (-sum(by_id[i][1] == line[3] for _, i in line[4]), drawn[line[2]])):
            best.setdefault(line[3], line)
        for chosen, lines in ((failures, sorted(ranked)), (successes, list(best.values()))):
            for _, _, query, label, near in lines[:SHOWN]:
                chosen.append((name, query, label, [i for _, i in near], [by_id[i][1] for _, i in near]))
    assert list(found["per_class"].items()) == list(per_class.items())
    for name, answers in (("failures", failures), ("successes", successes)):
        assert [
            (f["gallery"], f["query_id"], f["query_label"], list(f["neighbour_ids"]), list(f["neighbour_labels"]))
            for f in found[name]
        ] == answers
    assert len(failures) > SHOWN
    assert any(f["neighbour_labels"][0] != f["query_label"] for f in found["failures"])


def sample_worker(layout: str) -> list[Any]:
    result = measured("plain", layout, sample=True)
    assert result.sample is not None
    return [result.sample.rows_mD.tolist(), result.sample.labels_m.tolist(), result.sample.singular]


def test_a_sample_is_the_same_on_any_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [
        answer
        for world in harness.WORLD_SIZES
        for layout in ("even", "last")
        for answer in harness.run(world, sample_worker, layout)
    ]
    assert all(answer == answers[0] for answer in answers)
    rows, _, labels, _ = data("plain")
    found, of, singular = answers[0]
    assert of == labels.sort().values.tolist()  # all 13 classes fit
    class_of = {tuple(row): label for row, label in zip(rows.tolist(), labels.tolist(), strict=True)}
    assert [class_of.pop(tuple(row)) for row in found] == of  # each image once, beside its own label
    torch.testing.assert_close(torch.tensor(singular), torch.linalg.svdvals(rows), atol=1e-5, rtol=1e-5)

    monkeypatch.setattr(geometry, "SAMPLED_CLASSES", 4)
    monkeypatch.setattr(geometry, "SAMPLED_IMAGES", 12)
    _, of, _ = sample_worker("even")
    sizes = torch.tensor(of).unique(return_counts=True)[1]
    assert len(sizes) == 4
    assert sizes.max() <= 3


def test_a_class_larger_than_a_thousand() -> None:
    random = torch.Generator().manual_seed(5)
    labels = torch.tensor([0] * 1040 + [1] * 60)
    rows = torch.nn.functional.normalize(torch.randn(1100, 3, generator=random) + labels[:, None])
    found = measure(rows, torch.arange(1100), labels, ["both"] * 1100, Settings(metrics=("map@1000",)))
    order = (rows.double() @ rows.double().T).fill_diagonal_(-9).argsort(dim=1, descending=True)[:, :1000]
    right = (labels[order] == labels[:, None]).double()
    precisions = right.cumsum(1) / torch.arange(1, 1001)
    divisor = torch.where(labels == 0, 1000, 59)
    expected = ((precisions * right).sum(1) / divisor).mean().item()
    assert found.metrics == {"map@1000": pytest.approx(expected, abs=1e-12)}


# ---- what is refused: the same sentence on every rank ----


def refusal_worker(fault: str) -> str:
    rows, ids, labels, roles = data("plain")
    mine, settings = own("even"), {"recall_at": RECALL_AT, "train_classes": N + 1, **MORE.get(fault, {})}
    of_labels, of_roles = labels[mine], [roles[i] for i in mine.tolist()]
    if collectives.rank() == collectives.world_size() - 1:
        if fault == "two labels":  # it also brings the first image, under another label
            mine, of_labels = torch.cat([mine, torch.tensor([0])]), torch.cat([of_labels, torch.tensor([77])])
            of_roles += ["both"]
        if fault == "images":
            mine, of_labels, of_roles = mine[:-2], of_labels[:-2], of_roles[:-2]
    if fault == "role":
        of_roles = ["probe"] * len(mine)
    if fault == "no match":
        of_labels = ids[mine]
    if fault == "one class":
        of_labels = torch.zeros_like(of_labels)
    if fault == "a gallery lacks every class":
        of_roles = ["query" if label < 0 else "gallery:east" for label in of_labels.tolist()]
    with pytest.raises(RunError if fault == "images" else InputError) as caught:
        measure(rows[mine], ids[mine], of_labels, of_roles, Settings(**settings), expected=N)
    return str(caught.value)


MORE: dict[str, dict[str, Any]] = {
    "training classes": {"metrics": ("nmi",), "conventions": "released", "train_classes": None},
    "clusters": {"metrics": ("f1",), "conventions": "released"},
    "one class": {"metrics": ("distances",)},
}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("two labels", ["image id 1000 arrives as class", "77"]), ("images", ["88 images", "90 expected"]),
        ("role", ["'probe'", "both, gallery, query, train"]), ("no match", ["none of the 90 queries"]),
        ("a gallery lacks every class", ["none of the", "gallery images of east"]),
        ("training classes", ["evaluation.conventions=correct"]), ("clusters", ["91 clusters", "there are 90"]),
        ("one class", ["two classes and a class of two images"]),
    ],
)  # fmt: skip
def test_refused_alike_on_every_rank(fault: str, words: list[str]) -> None:
    for world in harness.WORLD_SIZES:
        # What only one rank holds is said with its number, but by every rank.
        (said,) = set(harness.run(world, refusal_worker, fault))
        assert all(word in said for word in words), said
