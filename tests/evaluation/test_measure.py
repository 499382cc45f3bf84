"""Measuring embeddings that are there: every metric, both conventions, several galleries, failures, bad input."""

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
from tests.evaluation.data import ALL, ROLES, D, N, images

TRAIN_CLASSES = 9
RECALL_AT = (1, 2, 4)
GALLERIES = {"": ("both", "gallery", "train"), "left": ("gallery:left",), "right-2": ("gallery:right-2",)}
"""Of the cameras; the others have the first one alone."""


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
    rows, ids, labels, roles = images(kind)
    mine = own(layout)
    return measure(
        rows[mine] if len(mine) else torch.empty(0, 0), ids[mine], labels[mine], [roles[i] for i in mine.tolist()],
        Settings(recall_at=RECALL_AT, seed=4, train_classes=TRAIN_CLASSES, **settings), sample=sample,
    )  # fmt: skip


def measure_worker(kind: str, layout: str, **settings: Any) -> dict[str, Any]:
    result = asdict(measured(kind, layout, **settings))
    assert result.pop("duplicates") == (N + collectives.world_size() if layout == "repeated" else 0)
    return result | {"seconds": None}


def measure_all_worker(kind: str, layout: str, threads: int, conventions: str, backend: str) -> dict[str, Any]:
    torch.set_num_threads(threads)
    found = measure_worker(kind, layout, metrics=ALL, conventions=conventions, backend=backend)
    torch.set_num_threads(1)
    return found


def by_id(kind: str) -> tuple[dict[int, oracle.Row], dict[int, int], dict[int, str]]:
    """Row, label and role of each image, by ascending id."""
    rows, ids, labels, roles = images(kind)
    columns = (rows.double().tolist(), labels.tolist(), roles)
    row_of, label_of, role_of = (dict(sorted(zip(ids.tolist(), column, strict=True))) for column in columns)
    return row_of, label_of, role_of


def expected(kind: str, released: bool) -> tuple[dict[str, float], list[tuple[int, int, int]]]:
    """(metrics, (queries, images, excluded) of each gallery), all by loops."""
    row_of, label_of, role_of = by_id(kind)
    metrics: dict[str, float] = {}
    counts = []
    for name, of in GALLERIES.items() if kind == "cameras" else [("", GALLERIES[""])]:
        found, queries, excluded = oracle.evaluate(
            row_of, label_of, role_of, RECALL_AT, gallery_roles=of, released=released
        )
        metrics |= {f"{name}/{metric}" if name else metric: value for metric, value in found.items()}
        counts.append((queries, sum(role in of for role in role_of.values()), excluded))
    plain, classes = list(row_of.values()), list(label_of.values())
    k = TRAIN_CLASSES if released else 13
    drawn = sorted(rng(4, "k-means").permutation(N)[:k].tolist())
    clusters, _ = oracle.k_means(plain, [plain[i] for i in drawn])
    metrics["nmi"] = oracle.nmi(classes, clusters)
    metrics["f1"] = oracle.pairwise_f1(classes, clusters)
    metrics |= oracle.class_distances(plain, classes, cosine=released)
    metrics["rho_spectrum"] = oracle.rho_spectrum(plain, leave_out=int(released))
    return metrics, counts


@pytest.mark.parametrize("conventions", ["correct", "released"])
@pytest.mark.parametrize("kind", ["random", "float64", "copies", "collapsed", "flat", *ROLES])
def test_every_metric_is_what_loops_say_on_any_ranks_with_the_same_bits(kind: str, conventions: str) -> None:
    metrics, counts = expected(kind, conventions == "released")
    answers = [
        answer
        for world in harness.MORE_WORLD_SIZES
        for layout, threads, backend in (("even", 1, "faiss"), ("last", 2, "torch"), ("repeated", 1, "torch"))
        for answer in harness.run(world, measure_all_worker, kind, layout, threads, conventions, backend)
    ]
    assert all(answer == answers[0] for answer in answers)
    found = answers[0]
    assert found["metrics"].keys() == metrics.keys()
    for name, value in metrics.items():
        # Square roots of rounding errors, where points coincide, and the rounding of the Gram matrix.
        accuracy = 1e-6 if name == "rho_spectrum" or kind == "collapsed" else 1e-12
        assert found["metrics"][name] == pytest.approx(value, abs=accuracy), name
    assert [found[name] for name in ("queries", "gallery", "excluded")] == [sum(of) for of in zip(*counts, strict=True)]
    assert (found["excluded"] > 0) == (conventions == "correct")


def test_the_spectrum_of_fewer_images_than_dimensions() -> None:
    rows = images("random")[0][: D - 2]
    singular = geometry.singular_values(rows)
    found, released = (geometry.rho_spectrum(singular, leave_out=left) for left in (0, 1))
    assert found == pytest.approx(oracle.rho_spectrum(rows.double().tolist()), abs=1e-6)
    assert released == pytest.approx(oracle.rho_spectrum(rows.double().tolist(), 1), abs=1e-6)
    assert released != found


def test_recall_by_class_and_the_worst_and_best_queries() -> None:
    found = measure_worker("cameras", "even")
    row_of, label_of, role_of = by_id("cameras")
    drawn = dict(zip(row_of, rng(0, "best queries").permutation(N).tolist(), strict=True))
    per_class: dict[tuple[str, int], tuple[int, float]] = {}
    failures, successes = [], []
    for name, of in GALLERIES.items():
        gallery = [i for i, role in role_of.items() if role in of]
        largest = max(oracle.Counter(label_of[i] for i in gallery).values())
        hits: dict[int, list[bool]] = {}
        ranked = []
        for query, label in label_of.items():
            if role_of[query] not in ("both", "query") or not any(label_of[i] == label for i in gallery if i != query):
                continue
            near = oracle.nearest([row_of[query]], [query], [row_of[i] for i in gallery], gallery, 99)[query]
            ids = [i for _, i in near[: max(*RECALL_AT, largest - (name == ""))]]  # what recall and MAP@R look at
            right = [label_of[i] == label for i in ids]
            hits.setdefault(label, []).append(right[0])
            first = right.index(True) if True in right else len(right)
            shown = (name, query, label, ids[:SHOWN_NEIGHBOURS], [label_of[i] for i in ids[:SHOWN_NEIGHBOURS]])
            ranked.append((-first, -near[0][0], query, sum(right[:SHOWN_NEIGHBOURS]), shown))
        per_class |= {(name, label): (len(of), sum(of) / len(of)) for label, of in sorted(hits.items())}
        failures += [shown for *_, shown in sorted(ranked)[:SHOWN]]
        best: dict[int, Any] = {}
        for *_, query, _, shown in sorted(ranked, key=lambda line: (-line[3], drawn[line[2]])):
            best.setdefault(label_of[query], shown)
        successes += [*best.values()][:SHOWN]
    assert list(found["per_class"].items()) == list(per_class.items())
    for name, answers in (("failures", failures), ("successes", successes)):
        assert [
            (f["gallery"], f["query_id"], f["query_label"], list(f["neighbour_ids"]), list(f["neighbour_labels"]))
            for f in found[name]
        ] == answers
    assert len(failures) > SHOWN
    assert any(f["neighbour_labels"][0] != f["query_label"] for f in found["failures"])


def sample_worker(layout: str) -> list[Any]:
    result = measured("random", layout, sample=True)
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
    rows, _, labels, _ = images("random")
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


REFUSED = {
    "images": ["88 images", "90 expected"],
    "role": ["'probe'", "both, gallery, query, train"],
    "a gallery lacks every class": ["none of the", "gallery images of east"],
}


def refused_worker(fault: str) -> str:
    rows, ids, labels, roles = images("random")
    mine = own("even")
    if fault == "images" and collectives.rank() == collectives.world_size() - 1:
        mine = mine[:-2]
    if fault == "role":
        roles = ["probe"] * N
    if fault == "a gallery lacks every class":
        roles = ["query" if label < 0 else "gallery:east" for label in labels.tolist()]
    with pytest.raises(RunError if fault == "images" else InputError) as caught:
        measure(rows[mine], ids[mine], labels[mine], [roles[i] for i in mine.tolist()], Settings(), expected=N)
    return str(caught.value)


@pytest.mark.parametrize("fault", REFUSED)
def test_refused_alike_on_every_rank(fault: str) -> None:
    for world in harness.WORLD_SIZES:
        # Images that only one rank lacks are said by every rank.
        (said,) = set(harness.run(world, refused_worker, fault))
        assert all(word in said for word in REFUSED[fault]), said
