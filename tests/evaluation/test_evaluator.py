"""The public ``evaluate``: any rows, labels and ranks, against other libraries, and what it refuses."""

import functools
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import dist_obdsd
from dist_obdsd.distributed import collectives
from dist_obdsd.errors import InputError, RunError
from tests import harness

N, D = 302, 16
ALL = ("recall", "map@r", "r_precision", "map@1000", "map@c", "nmi", "f1", "distances", "rho_spectrum")


@functools.cache
def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [N, D] of any length, labels; two classes have one image."""
    random = torch.Generator().manual_seed(3)
    labels = torch.cat([torch.randint(0, 25, (N - 2,), generator=random), torch.tensor([-98, 99])])
    rows = torch.randn(25, D, generator=random)[labels % 25] + torch.randn(N, D, generator=random)
    return rows, labels


def own() -> torch.Tensor:
    order = torch.randperm(N, generator=torch.Generator().manual_seed(collectives.world_size()))
    return order[collectives.rank() :: collectives.world_size()]


def worker(form: str = "tensors") -> dict[str, float]:
    rows, labels = data()
    mine = own()
    rows, labels, ids = rows[mine], labels[mine], mine
    arguments: Any = {"tensors": (rows, labels), "arrays": (rows.double().numpy(), labels.numpy())}.get(form)
    if form == "texts":  # of which no rank has all
        arguments = rows, [f"class {label}" for label in labels.tolist()]
    if form in ("huge", "tiny"):
        arguments = rows.double() * {"huge": 1e200, "tiny": 1e-200}[form], labels
    if form == "repeated":
        arguments, ids = (torch.cat([rows, rows[:3]]), torch.cat([labels, labels[:3]])), torch.cat([ids, ids[:3]])
    return dist_obdsd.evaluate(*arguments, ids=ids, metrics=ALL)


def group_worker() -> dict[str, float] | str:
    """Ranks 0 and 2 evaluate without rank 1."""
    rows, labels = data()
    group, mine = dist.new_group([0, 2]), torch.arange(collectives.rank() // 2, N, 2)
    if collectives.rank() != 1:
        return dist_obdsd.evaluate(rows[mine], labels[mine], ids=mine, metrics=ALL, group=group)
    with pytest.raises(InputError, match="not among the ranks") as raised:
        dist_obdsd.evaluate(rows, labels, group=group)
    return str(raised.value)


def test_the_same_numbers_from_any_ranks_and_kinds_of_input() -> None:
    first = worker()
    for world in harness.MORE_WORLD_SIZES:
        for form in ("tensors", "texts", "repeated"):
            for found in harness.run(world, worker, form):
                assert found.pop("duplicates") == (3 * world if form == "repeated" else 0)
                assert found | {"duplicates": 0} == first
    assert first["queries"] == N - 2
    assert (first["gallery"], first["excluded"]) == (N, 2)
    first_rank, _, last_rank = harness.run(3, group_worker)
    assert first_rank == last_rank == first
    for form in ("arrays", "huge", "tiny"):  # float64 rows are not rounded, which moves the last bits
        assert worker(form) == pytest.approx(first, abs=1e-6)


def test_agrees_with_pytorch_metric_learning_and_scikit_learn() -> None:
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from sklearn.metrics import pairwise_distances
    from sklearn.neighbors import KNeighborsClassifier

    rows, labels = data()
    found = dist_obdsd.evaluate(rows, labels, metrics=ALL)
    names = {
        "precision_at_1": "recall@1", "r_precision": "r_precision", "mean_average_precision_at_r": "map@r",
    }  # fmt: skip
    theirs = AccuracyCalculator(include=tuple(names), k="max_bin_count", device=torch.device("cpu")).get_accuracy(
        torch.nn.functional.normalize(rows), labels
    )
    assert {ours: theirs[name] for name, ours in names.items()} == pytest.approx(
        {ours: found[ours] for ours in names.values()}, abs=1e-6
    )
    assert 0.1 < found["map@r"] < 0.9
    unit = torch.nn.functional.normalize(rows.double()).numpy()
    matched = np.array([(labels == label).sum() > 1 for label in labels])
    without = {i: (np.delete(unit, i, 0), np.delete(labels, i)) for i in np.flatnonzero(matched)}
    hits = [KNeighborsClassifier(1).fit(*of).predict(unit[[i]])[0] == labels[i] for i, of in without.items()]
    assert found["recall@1"] == pytest.approx(np.mean(hits), abs=1e-6)
    within = [
        pairwise_distances(unit[labels == c]).sum() / (m * (m - 1))
        for c in labels.unique() if (m := int((labels == c).sum())) > 1
    ]  # fmt: skip
    assert found["distance_intra"] == pytest.approx(np.mean(within), abs=1e-6)


def test_queries_and_gallery_are_masks() -> None:
    rows, labels = data()
    asks = torch.arange(N) % 3 == 0
    found = dist_obdsd.evaluate(rows, labels, queries=asks, gallery=~asks, recall_at=[1])
    unit = torch.nn.functional.normalize(rows.double())
    first = (unit[asks] @ unit[~asks].T).argmax(1)
    counts = torch.isin(labels[asks], labels[~asks])
    assert found["recall@1"] == (labels[~asks][first] == labels[asks])[counts].double().mean()
    assert found["queries"] == counts.sum()
    assert found["gallery"] == (~asks).sum()


def refused_worker(fault: str) -> str:
    last = collectives.rank() == collectives.world_size() - 1
    rows, labels = (x[own()].clone() for x in data())
    arguments: dict[str, Any] = {"ids": own()}
    if fault == "nan" and last:
        rows[3, 1], rows[5, 0] = torch.nan, torch.inf
    if fault == "zero" and last:
        rows[4] = 0
    if fault == "dimension" and last and collectives.world_size() > 1:
        rows = rows[:, :-1]
    if fault == "euclidean":
        rows, arguments["distance"] = rows.double() * 1e200, "euclidean"
    if fault == "whole rows":
        rows = rows.long()
    if fault == "nothing":
        rows, labels, arguments["ids"] = rows[:0], labels[:0], None
    if fault == "ids":
        arguments["ids"] = torch.zeros(len(labels), dtype=torch.int32)
    if fault == "few ids":
        arguments["ids"] = arguments["ids"][1:]
    if fault == "mask":
        arguments["queries"] = labels
    if fault == "no role":
        arguments["queries"] = arguments["gallery"] = labels > 0
    if fault == "gallery":
        arguments["recall_at"] = (1, 400)
    if fault in ("metrics", "distance", "recall_at", "conventions"):
        arguments[fault] = {"metrics": ["recal"], "recall_at": [0]}.get(fault, "best")
    of: Any = {"floats": labels / 2, "bytes": [b"a"] * len(labels)}.get(fault, labels)
    if fault == "mixed" and last:
        of = [str(label) for label in labels.tolist()]
    try:
        dist_obdsd.evaluate(rows, of, **arguments)
    except (InputError, RunError) as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


FAULTS = {
    "nan": ["2 of", "NaN", "id"],
    "zero": ["1 embeddings have length 0", "of id"],
    "dimension": ["different kinds", "15", "16"],
    "euclidean": ["e+200", "scale"],
    "whole rows": ["int64", "floating-point"],
    "nothing": ["0 images"],
    "ids": ["arrives as class"],
    "few ids": ["equally many"],
    "mask": ["queries", "int64", "booleans"],
    "no role": ["neither in queries nor in gallery"],
    "gallery": ["k=400", f"offers {N - 1}"],
    "metrics": ["'recal'", "map@r"],
    "distance": ["distance", "'best'", "cosine, euclidean"],
    "recall_at": ["recall_at", "(0,)"],
    "conventions": ["conventions", "'best'", "released"],
    "floats": ["labels", "float32", "integers or texts"],
    "bytes": ["labels", "|S1", "integers or texts"],
    "mixed": ["texts on some ranks"],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_is_refused_alike_on_every_rank(fault: str) -> None:
    for world in (1, 3):
        answers = harness.run(world, refused_worker, fault)
        assert len(set(answers)) == 1
        if world == 1 and fault in ("dimension", "mixed"):
            assert answers == ["accepted"]
        else:
            assert answers[0].startswith("RunError" if fault == "nothing" else "InputError")
            assert all(word in answers[0] for word in FAULTS[fault]), answers[0]
