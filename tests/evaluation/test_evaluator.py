"""Evaluation from images to means: against double loops, and the same bits at 1, 2 and 3 real processes."""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest
import torch

from dist_obdsd.config import parse_config
from dist_obdsd.config.sections import EvaluationConfig
from dist_obdsd.data.manifest import Manifest, Shard
from dist_obdsd.distributed import collectives
from dist_obdsd.errors import InputError, RunError
from dist_obdsd.evaluation.evaluator import EvaluationResult, _train_classes, embed_all, evaluate
from dist_obdsd.evaluation.retrieval import global_means
from dist_obdsd.evaluation.splits import check_evaluable
from tests import harness
from tests.evaluation import oracle

D = 6
CPU = torch.device("cpu")
PROTOCOLS = ("self", "validation", "query/gallery", "ties", "collapsed")
worlds = pytest.mark.parametrize("world", harness.WORLD_SIZES)


@dataclass(frozen=True)
class Batch:
    images: torch.Tensor
    ids: torch.Tensor
    labels: torch.Tensor
    roles: list[str]


@functools.cache
def images(protocol: str) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """(uint8 images [n, 1, 1, D], labels, roles) of n = 90 images; the id of an image is 1000 minus its place."""
    random = torch.Generator().manual_seed(PROTOCOLS.index(protocol))
    # Classes of 1, 2, 3, ... images; the largest is larger than any recall list asked for here.
    labels = torch.repeat_interleave(torch.arange(13), torch.arange(13) + 1)[:90]
    centres = torch.randint(60, 200, (13, D), generator=random)
    pixels = centres[labels] + torch.randint(-50, 51, (90, D), generator=random)
    roles = {"validation": ["train"], "query/gallery": ["query", "gallery", "gallery", "both"]}.get(protocol, ["both"])
    if protocol == "ties":
        pixels = pixels // 128  # so few values that many images look the same
    if protocol == "collapsed":
        pixels = torch.full_like(pixels, 7)
    order = torch.randperm(90, generator=random)
    roles = (roles * 90)[:90]
    if protocol == "query/gallery":
        roles[int((labels[order] == 0).nonzero())] = "query"  # a query that has nothing to find
    return pixels[order].to(torch.uint8)[:, None, None, :], labels[order], roles


def embed(pixels: torch.Tensor) -> torch.Tensor:
    """A small stand-in network, row by row, so that it is the same in any batch."""
    rows = pixels.flatten(1).double() + 0.5
    squares = sum(rows[:, d] ** 2 for d in range(D))
    return (rows / squares.sqrt()[:, None]).float()


def batches(protocol: str, places: list[int], size: int = 8) -> Iterator[Batch]:
    pixels, labels, roles = images(protocol)
    for start in range(0, len(places), size):
        some = torch.tensor(places[start : start + size])
        padded = torch.zeros(size, *pixels.shape[1:], dtype=torch.uint8)
        padded[: len(some)] = pixels[some]
        yield Batch(padded, 1000 - some, labels[some], [roles[i] for i in some.tolist()])


def own_places(layout: str) -> list[int]:
    rank, world = collectives.rank(), collectives.world_size()
    if layout == "even":
        return list(range(rank, 90, world))
    if layout == "one":  # everything on the last rank
        return list(range(90)) if rank == world - 1 else []
    if layout == "reversed":
        return list(range(90))[::-1][rank::world]
    assert layout == "repeated"  # every rank also reads what the next one reads, and its own first image twice
    return [i for r in (rank, (rank + 1) % world) for i in range(r, 90, world)] + [rank]


def evaluate_worker(protocol: str, layout: str, backend: str, recall_at: tuple[int, ...] = (1, 2, 4)) -> dict[str, Any]:
    with torch.inference_mode(layout == "one"):  # callers may or may not
        result = evaluate(
            embed,
            batches(protocol, own_places(layout)),
            expected_count=90,
            config=EvaluationConfig(recall_at=recall_at, backend=backend),
            device=CPU,
        )
    return asdict(result)


@functools.cache
def expected(protocol: str) -> tuple[dict[str, float], int, int]:
    pixels, labels, roles = images(protocol)
    ids = [1000 - i for i in range(90)]
    rows = dict(zip(ids, embed(pixels).double().tolist(), strict=True))
    return oracle.evaluate(
        rows, dict(zip(ids, labels.tolist(), strict=True)), dict(zip(ids, roles, strict=True)), (1, 2, 4)
    )


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_double_loop_at_any_number_of_ranks_with_the_same_bits(protocol: str) -> None:
    metrics, queries, excluded = expected(protocol)
    seen = []
    for world in harness.WORLD_SIZES:
        for layout, backend in (("even", "faiss"), ("one", "torch"), ("reversed", "torch"), ("repeated", "faiss")):
            for result in harness.run(world, evaluate_worker, protocol, layout, backend):
                assert (result["queries"], result["excluded"]) == (queries, excluded)
                assert result["gallery"] == sum(role != "query" for role in images(protocol)[2])
                assert result["duplicates"] == ((90 + world) if layout == "repeated" else 0)
                assert result["seconds"] > 0
                seen.append(result["metrics"])
    assert all(of_run == seen[0] for of_run in seen)
    assert seen[0] == pytest.approx(metrics, abs=1e-12)
    assert list(seen[0]) == ["recall@1", "recall@2", "recall@4", "map@r"]
    assert excluded >= 1  # the class of one image is there, and is counted


def test_the_protocols_are_no_trivial_ones() -> None:
    values = [expected(protocol)[0]["map@r"] for protocol in PROTOCOLS]
    assert len(set(values)) >= 4
    assert all(0.01 < value < 0.95 for value in values)


def means_worker(seed: int) -> tuple[float, float, float]:
    """(global mean, mean of the ranks' means, plain sum over the gathered values) of values in uneven shares."""
    rank, world = collectives.rank(), collectives.world_size()
    values = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) ** 8
    cuts = {1: [0, 1000], 2: [0, 250, 1000], 3: [0, 60, 250, 1000]}[world][::-1]
    own = values[cuts[rank + 1] : cuts[rank]]
    mean = global_means({"value": own}, torch.arange(cuts[rank + 1], cuts[rank]))["value"]
    gathered = collectives.gather_ragged(own)
    of_ranks = collectives.gather_json(own.mean().item())
    return mean, sum(of_ranks) / world, sum(gathered.tolist()) / 1000


def test_means_are_of_queries_and_not_of_ranks() -> None:
    answers = [answer for world in harness.WORLD_SIZES for answer in harness.run(world, means_worker, 5)]
    assert len({mean for mean, _, _ in answers}) == 1
    # Controls: a mean of means is another number, and a plain sum in rank order has other last bits.
    assert abs(answers[1][1] - answers[1][0]) > 1e-4
    assert len({plain for _, _, plain in answers}) > 1
    values = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) ** 8
    assert answers[0][0] == math.fsum(values.tolist()) / 1000


def test_padding_rows_are_never_images() -> None:
    rows, ids, labels, roles = embed_all(embed, batches("self", list(range(13))), CPU)
    assert rows.shape == (13, D)
    assert rows.dtype == torch.float32
    assert ids.tolist() == [1000 - i for i in range(13)]
    assert len(labels) == len(roles) == 13
    assert torch.equal(rows, embed(images("self")[0][:13]))


def test_embedding_keeps_no_graph() -> None:
    weight = torch.ones(D, requires_grad=True)
    rows, *_ = embed_all(lambda pixels: embed(pixels) * weight, batches("self", [0, 1, 2]), CPU)
    assert not rows.requires_grad


def test_seconds_do_not_make_results_differ() -> None:
    result = EvaluationResult({"recall@1": 1.0}, 3, 3, 0, 0, 0.5)
    assert result == replace(result, seconds=0.7)
    assert result != replace(result, excluded=1)


# ---- what is refused: the same sentence on every rank ----


def refusal_worker(fault: str) -> tuple[str, str]:
    last = collectives.rank() == collectives.world_size() - 1
    places, recall_at, network = own_places("even"), (1, 2, 4), embed
    if fault == "missing" and last:
        places = places[:-2]
    if fault == "nothing":
        places = []
    if fault == "beyond the gallery":
        recall_at = (1, 200)
    if fault == "nan" and last:
        network = lambda pixels: embed(pixels).masked_fill(pixels.flatten(1)[:, :1] == pixels[0, 0, 0, 0], torch.nan)  # noqa: E731
    if fault == "failure" and last:
        network = failing
    if fault == "rows":
        network = lambda pixels: embed(pixels)[:-1]  # noqa: E731
    share = batches("self", places)
    if fault == "role":
        share = changed(share, lambda batch: replace(batch, roles=["probe"] * len(batch.roles)))
    if fault == "no match":
        share = changed(share, lambda batch: replace(batch, labels=batch.ids))
    if fault == "no gallery":
        share = changed(share, lambda batch: replace(batch, roles=["query"] * len(batch.roles)))
    try:
        evaluate(network, share, expected_count=90, config=EvaluationConfig(recall_at=recall_at), device=CPU)
    except (InputError, RunError) as error:
        return type(error).__name__, str(error)
    raise AssertionError("not refused")


def failing(pixels: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("out of memory")


def changed(share: Iterator[Batch], change: Callable[[Batch], Batch]) -> Iterator[Batch]:
    for batch in share:
        yield change(batch)


@worlds
@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("missing", "RunError", ["88 images", "90 are expected"]),
        ("nothing", "RunError", ["0 images", "90 are expected"]),
        ("beyond the gallery", "InputError", ["k=200", "offers 89"]),
        ("nan", "RunError", ["NaN", "image id"]),
        ("failure", "RunError", ["out of memory"]),
        ("rows", "RunError", ["(7, 6) for 8 images"]),
        ("role", "InputError", ["'probe'", "both, gallery, query, train"]),
        ("no match", "InputError", ["none of the 90 queries"]),
        ("no gallery", "InputError", ["none of the 90 queries", "0 gallery images"]),
    ],
)
def test_refused_alike_on_every_rank(world: int, fault: str, kind: str, words: list[str]) -> None:
    answers = harness.run(world, refusal_worker, fault)
    assert len(set(answers)) == 1
    assert answers[0][0] == kind
    assert all(word in answers[0][1] for word in words), answers[0][1]


def manifest_of(test: list[int], roles: list[str] | None = None) -> Manifest:
    """One class 0 of ten images to train on, and test images of the given classes."""
    train = Shard("a.tar", 0, "", tuple(range(10)), (0,) * 10, ("train",) * 10)
    ids = tuple(range(10, 10 + len(test)))
    shard = Shard("b.tar", 0, "", ids, tuple(test), tuple(roles or ["both"] * len(test)))
    return Manifest({}, 0, 2, tuple("abcdef"), {"train": (train,), "test": (shard,)})


@pytest.mark.parametrize(
    ("test", "roles", "sentence"),
    [
        ([1, 2, 3, 4, 5], None, "no query of the test images has another"),
        ([1, 1, 2, 2], None, "asks for 4 neighbours but a query of the test images has 3 others"),
        ([1, 1, 2, 2, 2], ["query", "query", "gallery", "gallery", "gallery"], "no query of the test images"),
    ],
)
def test_a_test_set_that_cannot_be_measured_is_refused_before_training(test, roles, sentence):
    raw = {"name": "x", "epochs": 2, "data": {"shards": "x"}, "evaluation": {"recall_at": [1, 4]}}
    with pytest.raises(InputError, match=sentence):
        check_evaluable(manifest_of(test, roles), parse_config(raw, "x"), [])
    raw["evaluation"]["test"] = False
    check_evaluable(manifest_of(test, roles), parse_config(raw, "x"), [])
    raw["evaluation"]["test"] = True
    check_evaluable(manifest_of([1, 1, 2, 2, 2]), parse_config(raw, "x"), [0])
    raw["evaluation"]["recall_at"] = [1]
    check_evaluable(manifest_of([1, 1], ["query", "gallery"]), parse_config(raw, "x"), [])


def test_the_number_of_trained_classes_is_asked_for_only_where_it_counts():
    """So shards without a training split, or with other classes than a run held out, can be evaluated."""
    raw = {"name": "x", "epochs": 2, "data": {"shards": "x"}, "validation": {"classes": ["gone", "too"]}}
    manifest = manifest_of([1, 1])
    assert _train_classes(manifest, parse_config(raw, "x")) is None
    raw["evaluation"] = {"conventions": "released"}
    with pytest.raises(InputError, match="holds 'gone', which is no training class"):
        _train_classes(manifest, parse_config(raw, "x"))
    assert _train_classes(replace(manifest, splits={"test": ()}), parse_config(raw, "x")) is None
    del raw["validation"]
    assert _train_classes(manifest, parse_config(raw, "x")) == 1
