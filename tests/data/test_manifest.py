import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_obdsd.data import manifest as manifests
from dist_obdsd.data.manifest import Manifest, split_classes
from dist_obdsd.errors import InputError
from tests.data.shards import examples, manifest_of, plan_of, unwritten


def make(train_classes: int = 6) -> Manifest:
    """Two training shards with classes of three images, and a test shard with two classes of two."""
    labels = [i // 3 for i in range(3 * train_classes)]
    train = manifest_of([labels[::2], labels[1::2]])
    test = unwritten("test-000000.tar", range(1000, 1004), [train_classes + i // 2 for i in range(4)], ["both"] * 4)
    names = tuple(f"class {i}" for i in range(train_classes + 2))
    return replace(train, seed=3, classes=names, splits=train.splits | {"test": (test,)})


def test_a_manifest_survives_being_written_and_read() -> None:
    manifest = make()
    text = manifests.to_json(manifest)
    read = manifests.from_json(text)
    assert (read, manifests.to_json(read)) == (manifest, text)
    assert (read.images("train"), read.images("test"), read.class_ids("test")) == (18, 4, [6, 7])
    assert read.digest != manifests.from_json(text.replace('"seed": 3', '"seed": 4')).digest


WRONG_ROLES = ("judge", "gallery:", "gallery:a/b", "query:a")


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("format", "dist-obdsd shards 2", "has format 'dist-obdsd shards 2' but this program reads"),
        ("seed", "many", "seed is 'many'"),
        ("classes", [7] * 8, r"classes.0 is 7"),
        ("test shard's ids", [2**63, 1001, 1002, 1003], r"splits.test.0.ids.0 is"),
        ("test shard's ids", [1000, 1001, 1002], "lists 3 ids, 4 classes and 4 roles"),
        ("test shard's ids", [1000, 1001, 1002, 0], "every id must be unique"),
        ("test shard's classes", [6, 6, 7, 8], "has class id 8 but 8 classes are named"),
        ("test shard's classes", [6, 6, 7, 5], "class 'class 5' is in train and in test"),
        *(("test shard's roles", ["both"] * 3 + [role], f"has the role '{role}'") for role in WRONG_ROLES),
        ("test shard's file", "../test.tar", "lies outside the folder"),
        ("test shard's file", "/test.tar", "lies outside the folder"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(where: str, value: object, message: str) -> None:
    raw = json.loads(manifests.to_json(make()))
    holder = raw["splits"]["test"][0] if where.startswith("test") else raw
    holder[where.removeprefix("test shard's ")] = value
    with pytest.raises(InputError, match=message):
        manifests.from_json(json.dumps(raw))


JSON = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers())


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Everything in nested lists and dictionaries: (list or dictionary, key)."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


@examples(100)
@given(st.data())
def test_any_value_in_any_place_is_taken_or_refused(data: st.DataObject) -> None:
    raw = json.loads(manifests.to_json(make()))
    holder, key = data.draw(st.sampled_from(list(places(raw))))
    holder[key] = data.draw(st.sampled_from([2**70, "\ud800", "\0", "../x", [[]], {}, ["7"]]) | JSON)
    with suppress(InputError):
        manifest = manifests.from_json(json.dumps(raw))
        manifests.to_json(manifest).encode()
        plan_of(manifest, classes=split_classes(manifest, 0)[0], global_size=4, lanes=2)


@pytest.mark.parametrize(
    ("arrange", "fact"),
    [
        (Path.rmdir, "there is no shard folder"),
        (lambda folder: None, "cannot read .*manifest.json: No such file"),
        (lambda folder: os.mkfifo(folder / "manifest.json"), "cannot read .*manifest.json: it is no plain file"),
        (lambda folder: (folder / "manifest.json").write_text('{"format": '), "manifest.json is not valid JSON"),
    ],
)
def test_a_missing_or_broken_manifest_is_refused(tmp_path: Path, arrange: Callable[[Path], None], fact: str) -> None:
    arrange(tmp_path)
    with pytest.raises(InputError, match=fact):
        manifests.load(tmp_path)


CLASSES, SEEDS = st.integers(4, 60), st.integers(0, 2**31)


@examples(50)
@given(CLASSES, st.floats(0, 0.99), SEEDS)
def test_validation_classes_are_apart_from_training_classes(classes: int, fraction: float, seed: int) -> None:
    held_out = round(fraction * classes)
    if fraction > 0 and not 2 <= held_out <= classes - 2:
        with pytest.raises(InputError, match="both sides need at least two classes"):
            split_classes(make(classes), seed, fraction=fraction)
        return
    train, validation = split_classes(make(classes), seed, fraction=fraction)
    assert len(validation) == held_out
    assert sorted(train + validation) == list(range(classes))
    assert (train, validation) == split_classes(make(classes), seed, fraction=fraction)


@examples(50)
@given(CLASSES, st.integers(2, 12), SEEDS)
def test_every_class_is_held_out_in_exactly_one_of_the_folds(classes: int, folds: int, seed: int) -> None:
    if classes // folds < 2:
        with pytest.raises(InputError, match=f"validation.folds={folds} of {classes} classes .* to {classes // 2} or"):
            split_classes(make(classes), seed, folds=folds, fold=folds - 1)
        return
    cuts = [split_classes(make(classes), seed, folds=folds, fold=fold) for fold in range(folds)]
    assert sorted(c for _, validation in cuts for c in validation) == list(range(classes))
    assert all(sorted(train + validation) == list(range(classes)) for train, validation in cuts)
    sizes = {len(validation) for _, validation in cuts}
    assert max(sizes) - min(sizes) <= 1


def test_validation_classes_are_held_out_by_name() -> None:
    assert split_classes(make(), 0, classes=["class 4", "class 1", "class 4"]) == ([0, 2, 3, 5], [1, 4])
    for names, fact in (
        (["class 1", "clas 3"], "holds 'clas 3', which is no training class .*; did you mean 'class 3'?"),
        (["class 1", "class 7"], "holds 'class 7', which is no training class"),  # of the test split
        (["class 1"], "validation.classes holds out 1 of 6 classes; both sides need at least two"),
    ):
        with pytest.raises(InputError, match=fact):
            split_classes(make(), 0, classes=names)
