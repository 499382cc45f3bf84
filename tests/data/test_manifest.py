import json
import os
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_obdsd.data import manifest as manifests
from dist_obdsd.data.manifest import Manifest, Shard, asks, gallery_of
from dist_obdsd.errors import InputError


def make(train_classes: int = 6, per_class: int = 3) -> Manifest:
    train = [(i, i // per_class) for i in range(train_classes * per_class)]
    test = [(1000 + i, train_classes + i // 2) for i in range(4)]
    return Manifest(
        recipe={"name": "made"},
        seed=3,
        samples_per_class=2,
        classes=tuple(f"class {i}" for i in range(train_classes + 2)),
        splits={
            "train": (shard("train-000000.tar", train[::2], "train"), shard("train-000001.tar", train[1::2], "train")),
            "test": (shard("test-000000.tar", test, "both"),),
        },
    )


def shard(file: str, rows: list[tuple[int, int]], role: str) -> Shard:
    return Shard(file, 10, "00", tuple(i for i, _ in rows), tuple(c for _, c in rows), (role,) * len(rows))


def test_a_manifest_survives_being_written_and_read() -> None:
    manifest = make()
    text = manifests.to_json(manifest)
    read = manifests.from_json(text)
    assert read == manifest
    assert manifests.to_json(read) == text
    assert (read.images("train"), read.images("test"), read.class_ids("test")) == (18, 4, [6, 7])
    assert read.digest != manifests.from_json(text.replace('"seed": 3', '"seed": 4')).digest


def change(path: list[str | int], value: object) -> str:
    raw = json.loads(manifests.to_json(make()))
    node = raw
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    return json.dumps(raw)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format"], "dist-obdsd shards 2", "has format 'dist-obdsd shards 2' but this program reads"),
        (["seed"], "many", "seed is 'many'"),
        (["splits", "test", 0, "ids", 0], 2**63, r"splits.test.0.ids.0 is"),
        (["classes", 0], 7, r"classes.0 is 7"),
        (["splits", "test", 0, "ids"], [1000, 1001, 1002], "lists 3 ids, 4 classes and 4 roles"),
        (["splits", "test", 0, "ids"], [1000, 1001, 1002, 0], "every id must be unique"),
        (["splits", "test", 0, "classes"], [6, 6, 7, 8], "has class ids 6 to 8 but 8 classes are named"),
        (["splits", "test", 0, "classes"], [6, 6, 7, 5], "class 'class 5' is in train and in test"),
        (["splits", "test", 0, "roles"], ["both", "both", "both", "judge"], "has the role 'judge'"),
        (["splits", "test", 0, "file"], "../test.tar", "lies outside the folder"),
        (["splits", "test", 0, "file"], "/test.tar", "lies outside the folder"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(path: list[str | int], value: object, message: str) -> None:
    manifests.from_json(change(["seed"], 3))  # unchanged, it is sound
    with pytest.raises(InputError, match=message):
        manifests.from_json(change(path, value))


def test_missing_and_broken_manifests_are_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="there is no shard folder"):
        manifests.load(tmp_path / "none")
    with pytest.raises(InputError, match="cannot read .*manifest.json"):
        manifests.load(tmp_path)
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(InputError, match=r"cannot read .*manifest.json: it is no plain file"):
        manifests.load(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").write_text('{"format": ')
    with pytest.raises(InputError, match="is not valid JSON"):
        manifests.load(tmp_path)


def split(manifest: Manifest, seed: int = 0, **how: object) -> tuple[list[int], list[int]]:
    return manifests.split_classes(manifest, seed, **how)


CLASSES, SEEDS = st.integers(4, 60), st.integers(0, 2**31)


@settings(deadline=None, max_examples=50)
@given(CLASSES, st.floats(0, 0.99), SEEDS)
def test_validation_classes_are_apart_from_training_classes(classes: int, fraction: float, seed: int) -> None:
    manifest = make(train_classes=classes)
    held_out = round(fraction * classes)
    if fraction > 0 and not 2 <= held_out <= classes - 2:
        with pytest.raises(InputError, match="both sides need at least two classes"):
            split(manifest, seed, fraction=fraction)
        return
    train, validation = split(manifest, seed, fraction=fraction)
    assert len(validation) == held_out
    assert sorted(train + validation) == manifest.class_ids("train")
    assert (train, validation) == split(manifest, seed, fraction=fraction)


@settings(deadline=None, max_examples=50)
@given(CLASSES, st.integers(2, 12), SEEDS)
def test_every_class_is_held_out_in_exactly_one_of_the_folds(classes: int, folds: int, seed: int) -> None:
    manifest = make(train_classes=classes)
    if classes // folds < 2:
        with pytest.raises(InputError, match=f"validation.folds={folds} of {classes} classes .* to {classes // 2} or"):
            split(manifest, seed, folds=folds, fold=folds - 1)
        return
    cuts = [split(manifest, seed, folds=folds, fold=fold) for fold in range(folds)]
    assert sorted(c for _, validation in cuts for c in validation) == manifest.class_ids("train")
    assert all(sorted(train + validation) == manifest.class_ids("train") for train, validation in cuts)
    sizes = {len(validation) for _, validation in cuts}
    assert max(sizes) - min(sizes) <= 1


def test_validation_classes_are_held_out_by_name() -> None:
    manifest = make()
    assert split(manifest, classes=["class 4", "class 1", "class 4"]) == ([0, 2, 3, 5], [1, 4])
    with pytest.raises(InputError, match="holds 'clas 3', which is no training class .*; did you mean 'class 3'?"):
        split(manifest, classes=["class 1", "clas 3"])
    with pytest.raises(InputError, match="holds 'class 7', which is no training class"):  # of the test split
        split(manifest, classes=["class 1", "class 7"])
    with pytest.raises(InputError, match="validation.classes holds out 1 of 6 classes; both sides need at least two"):
        split(manifest, classes=["class 1"])
    only_test = replace(manifest, splits={"test": manifest.splits["test"]})
    with pytest.raises(InputError, match="these shards have only test; training needs a train split"):
        split(only_test)


@pytest.mark.parametrize(
    ("role", "query", "gallery"),
    [
        *(("train", True, ""), ("both", True, ""), ("query", True, None), ("gallery", False, "")),
        *(("gallery:cam1", False, "cam1"), ("gallery:a.B_c-2", False, "a.B_c-2")),
        *((wrong, False, None) for wrong in ("gallery:", "gallery:a/b", "query:a")),
    ],
)
def test_what_an_image_of_a_role_does(role: str, query: bool, gallery: str | None) -> None:
    assert (asks(role), gallery_of(role)) == (query, gallery)
