"""Which images are measured, decided from the manifest alone; and how they are embedded."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from dist_obdsd.data.manifest import Manifest, Shard
from dist_obdsd.data.stream import EvalBatch
from dist_obdsd.errors import InputError, RunError
from dist_obdsd.training.evaluation import check_evaluable, embed_all, settings_from, validation_subset
from tests.training.test_train_step import settings

SIZES = {c: 3 + c % 4 for c in range(20)}
IMAGES = [c for c, size in SIZES.items() for _ in range(size)]


def manifest(train, test=()):
    """Training images of the given classes, and test images (class, role), over two shards each."""

    def shard(name, first, images):
        classes, roles = zip(*images, strict=True) if images else ((), ())
        return Shard(name, 0, "", tuple(range(first, first + len(images))), tuple(classes), tuple(roles))

    both = [(c, "train") for c in train]
    splits = {
        "train": (shard("a", 0, both[::2]), shard("b", 1000, both[1::2])),
        "test": (shard("c", 2000, list(test[::2])), shard("d", 3000, list(test[1::2]))),
    }
    return Manifest({}, 0, 2, tuple(map(str, range(100))), splits)


def subset(classes, limit="null", seed=0, images=IMAGES):
    config = settings(f"validation.max_images={limit}", f"seed={seed}")
    return validation_subset(manifest(images), classes, config)


@pytest.mark.parametrize("limit", [10, 17, 40, 80])
def test_whole_classes_within_the_budget_and_no_room_for_another(limit):
    classes = list(range(4, 20))
    taken = subset(classes, limit)
    used = sum(SIZES[c] for c in taken)
    assert taken == sorted(set(taken))
    assert set(taken) <= set(classes)
    assert used <= limit
    assert all(used + SIZES[c] > limit for c in set(classes) - set(taken))
    # The order in which classes or shards are named changes nothing; the seed does.
    assert subset(classes[::-1], limit, images=IMAGES[::-1]) == taken
    assert limit == 80 or any(subset(classes, limit, seed) != taken for seed in range(1, 6))


def test_without_a_budget_all_classes_are_taken():
    assert subset([9, 3, 5]) == subset([9, 3, 5], 1000) == [3, 5, 9]
    assert subset([], 1) == []


@pytest.mark.parametrize("limit", [1, 6])
def test_a_budget_below_two_classes_names_one_that_serves(limit):
    with pytest.raises(InputError, match=r"needs room for 2; set it to (\d+) or more") as raised:
        subset([2, 3, 6], limit)
    serves = int(str(raised.value).split("set it to ")[1].split()[0])
    assert len(subset([2, 3, 6], serves)) >= 2


def both(*classes):
    return [(label, "both") for label in classes]


def roles(query, **galleries):
    named = [(label, f"gallery:{name}") for name, labels in galleries.items() for label in labels]
    return [*((label, "query") for label in query), *named]


@pytest.mark.parametrize(
    ("images", "more", "sentence"),
    [
        (both(1, 1, 2, 2, 2), "recall_at=[1, 4]", None),
        (both(1, 1, 2, 2), "recall_at=[1, 4]", "asks for 4 neighbours but a query of the test images has 3 others"),
        (both(1, 2, 3, 4, 5), "recall_at=[1]", "no query of the test images has another"),
        ([(1, "query"), (1, "gallery")], "recall_at=[1]", None),
        ([(1, "query"), (2, "gallery"), (2, "gallery")], "recall_at=[1]", "no query of the test images"),
        (roles([5, 6], a=[5, 6], b=[6, 7]), "recall_at=[1]", None),
        (roles([5, 6], a=[5, 6], b=[8, 7]), "recall_at=[1]", r"gallery b.* has another image"),
        (roles([5, 6], a=[5, 6], b=[6, 7]), "recall_at=[3]", r"asks for 3 neighbours .*gallery a\) has 2 others"),
        (roles([5, 6], a=[5, 6], b=[6, 7]), "metrics=[map@r]", None),
    ],
)
def test_a_test_set_that_cannot_be_measured_is_refused(images, more, sentence):
    with pytest.raises(InputError, match=sentence) if sentence else nullcontext():
        check_evaluable(manifest([0] * 10, images), settings(f"evaluation.{more}"), [0])
    check_evaluable(manifest([0] * 10, images), settings(f"evaluation.{more}", "evaluation.test=false"), [0])


def test_trained_classes_are_counted_only_where_it_matters():
    """So shards without a training split, or with other classes than a run held out, can be evaluated."""
    shards, gone = manifest([0] * 10, both(1, 1)), "validation.classes=[gone, too]"
    released = "evaluation.conventions=released"
    assert settings_from(settings(gone), shards).train_classes is None
    with pytest.raises(InputError, match="holds 'gone', which is no training class"):
        settings_from(settings(gone, released), shards)
    without = replace(shards, splits={"test": shards.splits["test"]})
    assert settings_from(settings(gone, released), without).train_classes is None
    assert settings_from(settings(released), shards).train_classes == 1


D = 16


def batches():
    """13 images in two batches, of which the second is padded."""
    pixels = torch.arange(16 * D, dtype=torch.uint8).reshape(16, 1, 1, D)
    pixels[13:] = 0
    ids = torch.arange(13).split(8)
    return [EvalBatch(pixels[8 * n :][:8], own, own // 2, ("both",) * len(own)) for n, own in enumerate(ids)]


def test_padding_rows_are_never_images_and_no_graph_is_kept():
    weight = torch.ones(D, requires_grad=True)
    rows, ids, labels, roles = embed_all(lambda pixels: pixels.flatten(1) * weight, batches(), torch.device("cpu"))
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
def test_a_network_that_fails_is_told_so(embed, words):
    with pytest.raises(RunError, match=words):
        embed_all(embed, batches(), torch.device("cpu"))
