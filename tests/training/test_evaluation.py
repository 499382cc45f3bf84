"""Which images are measured, decided from the manifest alone."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from dist_obdsd.config import Config, parse_config
from dist_obdsd.data.manifest import Manifest, Shard
from dist_obdsd.data.stream import EvalBatch
from dist_obdsd.errors import InputError, RunError
from dist_obdsd.training.evaluation import check_evaluable, embed_all, settings_from, validation_subset


def settings(max_images: int | None = None, seed: int = 0, classes: Sequence[str] = (), **evaluation: object) -> Config:
    raw = {
        "name": "x", "epochs": 2, "seed": seed, "data": {"shards": "x"},
        "validation": {"max_images": max_images, "classes": list(classes)},
        "evaluation": {"recall_at": [1], **evaluation},
    }  # fmt: skip
    return parse_config(raw, "x")


def manifest(train: list[int], test: list[tuple[int, str]] = ()) -> Manifest:
    """Training images of the given classes, and test images (class, role), over two shards each."""

    def shard(name: str, first: int, images: list[tuple[int, str]]) -> Shard:
        classes, roles = zip(*images, strict=True) if images else ((), ())
        return Shard(name, 0, "", tuple(range(first, first + len(images))), tuple(classes), tuple(roles))

    both = [(c, "train") for c in train]
    splits = {
        "train": (shard("a", 0, both[::2]), shard("b", 1000, both[1::2])),
        "test": (shard("c", 2000, list(test[::2])), shard("d", 3000, list(test[1::2]))),
    }
    return Manifest({}, 0, 2, tuple(map(str, range(100))), splits)


SIZES = {c: 3 + c % 4 for c in range(20)}
IMAGES = [c for c, size in SIZES.items() for _ in range(size)]


@pytest.mark.parametrize("limit", [10, 17, 40, 80])
def test_whole_classes_within_the_budget_and_no_room_for_another(limit: int) -> None:
    classes = list(range(4, 20))
    taken = validation_subset(manifest(IMAGES), classes, settings(limit))
    used = sum(SIZES[c] for c in taken)
    assert taken == sorted(set(taken))
    assert set(taken) <= set(classes)
    assert used <= limit
    assert all(used + SIZES[c] > limit for c in set(classes) - set(taken))
    # The order in which classes or shards are named changes nothing; the seed does.
    assert validation_subset(manifest(IMAGES[::-1]), classes[::-1], settings(limit)) == taken
    others = [validation_subset(manifest(IMAGES), classes, settings(limit, seed)) for seed in range(1, 6)]
    assert limit == 80 or any(other != taken for other in others)


def test_without_a_budget_or_with_a_large_one_all_classes_are_taken() -> None:
    assert validation_subset(manifest(IMAGES), [9, 3, 5], settings()) == [3, 5, 9]
    assert validation_subset(manifest(IMAGES), [9, 3, 5], settings(1000)) == [3, 5, 9]
    assert validation_subset(manifest(IMAGES), [], settings(1)) == []


@pytest.mark.parametrize("limit", [1, 6])
def test_a_budget_below_two_classes_is_refused_with_one_that_serves(limit: int) -> None:
    classes = [2, 3, 6]
    with pytest.raises(InputError, match=r"needs room for 2; set it to (\d+) or more") as raised:
        validation_subset(manifest(IMAGES), classes, settings(limit))
    serves = int(str(raised.value).split("set it to ")[1].split()[0])
    assert len(validation_subset(manifest(IMAGES), classes, settings(serves))) >= 2


def both(*classes: int) -> list[tuple[int, str]]:
    return [(label, "both") for label in classes]


def roles(query: list[int], **galleries: list[int]) -> list[tuple[int, str]]:
    named = [(label, f"gallery:{name}") for name, labels in galleries.items() for label in labels]
    return [*((label, "query") for label in query), *named]


@pytest.mark.parametrize(
    ("images", "more", "sentence"),
    [
        (both(1, 1, 2, 2, 2), {"recall_at": [1, 4]}, None),
        (both(1, 1, 2, 2), {"recall_at": [1, 4]}, "asks for 4 neighbours but a query of the test images has 3 others"),
        (both(1, 2, 3, 4, 5), {}, "no query of the test images has another"),
        ([(1, "query"), (1, "gallery")], {}, None),
        ([(1, "query"), (1, "query"), (2, "gallery"), (2, "gallery")], {}, "no query of the test images"),
        (roles([5, 6], a=[5, 6], b=[6, 7]), {}, None),
        (roles([5, 6], a=[5, 6], b=[8, 7]), {}, r"gallery b.* has another image"),
        (roles([5, 6], a=[5, 6], b=[6, 7]), {"recall_at": [3]}, r"asks for 3 neighbours .*gallery a\) has 2 others"),
        (roles([5, 6], a=[5, 6], b=[6, 7]), {"recall_at": [3], "metrics": ["map@r"]}, None),
    ],
)
def test_a_test_set_that_cannot_be_measured_is_refused_before_training(images, more, sentence):
    with pytest.raises(InputError, match=sentence) if sentence else nullcontext():
        check_evaluable(manifest([0] * 10, images), settings(**more), [0])
    check_evaluable(manifest([0] * 10, images), settings(**more, test=False), [0])


def test_the_number_of_trained_classes_is_asked_for_only_where_it_counts():
    """So shards without a training split, or with other classes than a run held out, can be evaluated."""
    shards, gone = manifest([0] * 10, [(1, "both"), (1, "both")]), ["gone", "too"]
    assert settings_from(settings(classes=gone), shards).train_classes is None
    with pytest.raises(InputError, match="holds 'gone', which is no training class"):
        settings_from(settings(classes=gone, conventions="released"), shards)
    without = replace(shards, splits={"test": shards.splits["test"]})
    assert settings_from(settings(classes=gone, conventions="released"), without).train_classes is None
    assert settings_from(settings(conventions="released"), shards).train_classes == 1


# ---- embedding ----

D = 16
WEIGHT = torch.ones(D, requires_grad=True)


def batches() -> list[EvalBatch]:
    """13 images in two batches, of which the second is padded."""
    pixels = torch.arange(16 * D, dtype=torch.uint8).reshape(16, 1, 1, D)
    numbers = torch.arange(13)
    pixels[13:] = 0
    return [
        EvalBatch(pixels[at : at + 8], ids, ids // 2, ("both",) * len(ids))
        for at, ids in ((0, numbers[:8]), (8, numbers[8:]))
    ]


def test_padding_rows_are_never_images_and_no_graph_is_kept() -> None:
    rows, ids, labels, roles = embed_all(lambda pixels: pixels.flatten(1) * WEIGHT, batches(), torch.device("cpu"))
    assert torch.equal(rows, torch.arange(13 * D, dtype=torch.uint8).reshape(13, D).float())
    assert not rows.requires_grad
    assert ids.tolist() == list(range(13))
    assert len(labels) == len(roles) == 13


@pytest.mark.parametrize(
    ("embed", "words"),
    [
        (lambda pixels: pixels.flatten(1)[:-1], r"\(7, 16\) for 8 images"),
        (lambda x: x.flatten(1) / 0.0, "NaN .* diverged"),
    ],
)
def test_a_network_that_fails_is_told_so(embed: Any, words: str) -> None:
    with pytest.raises(RunError, match=words):
        embed_all(embed, batches(), torch.device("cpu"))
