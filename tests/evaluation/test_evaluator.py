"""The public ``evaluate``: any rows, labels and ranks, and what it refuses; the worked examples beside the metrics."""

import doctest
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist

import dist_obdsd
from dist_obdsd.distributed import collectives
from dist_obdsd.errors import InputError, RunError
from dist_obdsd.evaluation import clustering, geometry, metrics
from tests import harness
from tests.evaluation.data import ALL, LABELS, D, N, rows

ROWS = rows("random")


def own() -> torch.Tensor:
    order = torch.randperm(N, generator=torch.Generator().manual_seed(collectives.world_size()))
    return order[collectives.rank() :: collectives.world_size()]


def worker(form: str = "tensors") -> dict[str, float]:
    ids = torch.cat([own(), own()[:3]]) if form == "repeated" else own()
    rows, labels = ROWS[ids], LABELS[ids]
    arguments: Any = rows, labels
    if form == "arrays":
        arguments = rows.double().numpy(), labels.numpy()
    if form == "table":
        arguments = pd.DataFrame(rows.double().numpy()), pd.Series(labels.numpy())
    if form == "texts":  # of which no rank has all
        texts = [f"class {label}" for label in labels.tolist()]
        arguments = rows, np.array(texts, dtype=object) if collectives.rank() else texts  # pandas has objects
    if form in ("huge", "tiny"):
        arguments = rows.double() * {"huge": 1e200, "tiny": 1e-200}[form], labels
    return dist_obdsd.evaluate(*arguments, ids=ids, metrics=ALL)


def group_worker() -> dict[str, float] | str:
    """Ranks 0 and 2 evaluate without rank 1."""
    group, mine = dist.new_group([0, 2]), torch.arange(collectives.rank() // 2, N, 2)
    if collectives.rank() != 1:
        return dist_obdsd.evaluate(ROWS[mine], LABELS[mine], ids=mine, metrics=ALL, group=group)
    with pytest.raises(InputError, match="not among the ranks") as raised:
        dist_obdsd.evaluate(ROWS, LABELS, group=group)
    return str(raised.value)


def test_the_same_numbers_from_any_ranks_and_kinds_of_input() -> None:
    first = worker()
    for world in harness.MORE_WORLD_SIZES:
        for form in ("tensors", "texts", "repeated"):
            for found in harness.run(world, worker, form):
                assert found.pop("duplicates") == (3 * world if form == "repeated" else 0)
                assert found | {"duplicates": 0} == first
    assert (first["queries"], first["gallery"], first["excluded"]) == (N - 1, N, 1)
    first_rank, _, last_rank = harness.run(3, group_worker)
    assert first_rank == last_rank == first
    for form in ("arrays", "table", "huge", "tiny"):  # float64 rows are not rounded, which moves the last bits
        assert worker(form) == pytest.approx(first, abs=1e-6)


def test_queries_and_gallery_are_masks() -> None:
    rows, labels = ROWS, LABELS
    asks = torch.arange(N) % 3 == 0
    found = dist_obdsd.evaluate(rows, labels, queries=asks, gallery=~asks, recall_at=[1])
    unit = torch.nn.functional.normalize(rows.double())
    first = (unit[asks] @ unit[~asks].T).argmax(1)
    counts = torch.isin(labels[asks], labels[~asks])
    assert found["recall@1"] == (labels[~asks][first] == labels[asks])[counts].double().mean()
    assert found["queries"] == counts.sum()
    assert found["gallery"] == (~asks).sum()


RELEASED = {"conventions": "released"}
FAULTS: dict[str, tuple[Callable[[Any, Any, Any], dict[str, Any]], list[str]]] = {
    "nan": (lambda x, y, ids: {"embeddings": x.index_fill(0, torch.tensor([3, 5]), torch.nan)}, ["2 of", "NaN", "id"]),
    "zero": (lambda x, y, ids: {"embeddings": x.index_fill(0, torch.tensor([4]), 0)}, ["1 embeddings have length 0"]),
    "dimension": (lambda x, y, ids: {"embeddings": x[:, :-1]}, ["different kinds", f"{D - 1}", f"{D}"]),
    "mixed": (lambda x, y, ids: {"labels": [str(label) for label in y.tolist()]}, ["texts on some ranks"]),
    "euclidean": (lambda x, y, ids: {"embeddings": x.double() * 1e200, "distance": "euclidean"}, ["e+200", "scale"]),
    "whole rows": (lambda x, y, ids: {"embeddings": x.long()}, ["int64", "floating-point"]),
    "nothing": (lambda x, y, ids: {"embeddings": x[:0], "labels": [], "queries": [], "ids": None}, ["0 images"]),
    "ids": (lambda x, y, ids: {"ids": torch.zeros(len(y), dtype=torch.int32)}, ["id 0 arrives as class"]),
    "few ids": (lambda x, y, ids: {"ids": ids[1:]}, ["equally many"]),
    "mask": (lambda x, y, ids: {"queries": y}, ["queries", "int64", "booleans"]),
    "no role": (lambda x, y, ids: {"queries": y > 0, "gallery": y > 0}, ["neither in queries nor in gallery"]),
    "gallery": (lambda x, y, ids: {"recall_at": (1, 400)}, ["k=400", f"offers {N - 1}"]),
    "no match": (lambda x, y, ids: {"labels": ids}, [f"none of the {N} queries"]),
    "one class": (lambda x, y, ids: {"labels": 0 * y, "metrics": ["distances"]}, ["two classes and a class of two"]),
    "no training classes": (lambda x, y, ids: {"metrics": ["nmi"]} | RELEASED, ["evaluation.conventions=correct"]),
    "clusters": (lambda x, y, ids: {"metrics": ["f1"], "train_classes": 400} | RELEASED, ["400 clusters", f"are {N}"]),
    "metrics": (lambda x, y, ids: {"metrics": ["recal"]}, ["'recal'", "map@r"]),
    "distance": (lambda x, y, ids: {"distance": "best"}, ["distance", "'best'", "cosine, euclidean"]),
    "recall_at": (lambda x, y, ids: {"recall_at": [0]}, ["recall_at is [0]"]),
    "one recall": (lambda x, y, ids: {"recall_at": 1}, ["recall_at is 1", "a list"]),
    "conventions": (lambda x, y, ids: {"conventions": "best"}, ["conventions", "'best'", "released"]),
    "floats": (lambda x, y, ids: {"labels": y / 2}, ["labels", "float32", "integers or texts"]),
    "bytes": (lambda x, y, ids: {"labels": [b"a"] * len(y)}, ["labels", "|S1", "integers or texts"]),
}  # fmt: skip
"""What is wrong: arguments in place of good ones, and the facts of the message."""
OF_ONE_RANK = ("nan", "zero", "dimension", "mixed")


def refused_worker(fault: str) -> str:
    rows, labels = ROWS[own()], LABELS[own()]
    arguments: dict[str, Any] = {"embeddings": rows, "labels": labels, "ids": own()}
    if fault not in OF_ONE_RANK or collectives.rank() == collectives.world_size() - 1:
        arguments |= FAULTS[fault][0](rows, labels, own())
    with pytest.raises(RunError if fault == "nothing" else InputError) as caught:
        dist_obdsd.evaluate(**arguments)
    return str(caught.value)


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_is_refused_alike_on_every_rank(fault: str) -> None:
    for world in (3,) if fault in ("dimension", "mixed") else (1, 3):
        (said,) = set(harness.run(world, refused_worker, fault))
        assert all(word in said for word in FAULTS[fault][1]), said


@pytest.mark.parametrize(("module", "examples"), [(metrics, 12), (clustering, 3), (geometry, 2)])
def test_the_worked_examples(module: ModuleType, examples: int) -> None:
    outcome = doctest.testmod(module)
    assert outcome.attempted >= examples
    assert outcome.failed == 0
