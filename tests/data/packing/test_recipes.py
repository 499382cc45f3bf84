import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from dist_obdsd.data.packing.readers.base import Sample, list_samples
from dist_obdsd.data.packing.recipes import Recipe, load_recipe, recipe_names
from dist_obdsd.errors import InputError
from tests.data.packing.readers.layouts import listed
from tests.data.packing.sources import write
from tests.data.pictures import noise


def read(recipe: Recipe, source: Path | None) -> list[Sample]:
    with TemporaryDirectory() as scratch:
        return list_samples(recipe.make_reader(), source, Path(scratch))


def folder_recipe(**options: object) -> Recipe:
    return Recipe(name="mine", reader="folder", description="", options=options)


def test_every_recipe_of_the_repository_loads() -> None:
    assert set(recipe_names()) >= {"glyphs", "omniglot", "folder"}
    for name in recipe_names():
        assert load_recipe(name).name == name


def test_an_unknown_recipe_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match=r"no recipe 'omniglott'; did you mean omniglot\? recipes are .*glyphs"):
        load_recipe("omniglott")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nreader: folder\n", "description is missing"),
        ("name: x\nreader: pictures\ndescription: d\n", "reader is 'pictures'; set it to one of glyphs, folder, table"),
        ("name: x\nreader: folder\ndescription: d\nspeed: 1\n", "unknown key speed"),
        ("name: x\nreader: folder\ndescription: d\noptions: {fraction: 1}\n", "unknown key options.fraction"),
        ("name: x\nreader: folder\ndescription: d\noptions: {test_fraction: 1.5}\n", "options.test_fraction is 1.5"),
        ("name: x\nreader: folder\ndescription: d\nexpected: {train: {images: -1, classes: 1}}\n", "expected.train"),
        ("- a\n", "not a mapping"),
        ("a: [\n", "not valid YAML"),
    ],
)
def test_a_recipe_with_a_mistake_is_refused(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: x\nreader: folder\ndescription: d\n")
    assert load_recipe(path).name == "x"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_recipe(path)


def test_sources_that_are_missing_or_superfluous_are_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="reads a download"):
        read(load_recipe("omniglot"), None)
    with pytest.raises(InputError, match="draws its images"):
        read(load_recipe("glyphs"), tmp_path)
    with pytest.raises(InputError, match="does not exist; give the folder or the archive"):
        read(load_recipe("folder"), tmp_path / "none")


def class_folders(root: Path, names: str) -> None:
    for name in names:
        for i in range(2):
            write(root / name / f"{i}.{'PNG' if i else 'png'}", noise(0))


def test_a_folder_is_split_by_class_and_by_its_seed(tmp_path) -> None:
    class_folders(tmp_path, "abcdefghij")
    for name in ("a/notes.txt", "a/.hidden.png", ".thumbs/x.png"):
        write(tmp_path / name, b"no image")
    samples = read(folder_recipe(test_fraction=0.3), tmp_path)
    assert len(samples) == 20
    classes = {split: {s.class_name for s in samples if s.split == split} for split in ("train", "test")}
    assert (len(classes["train"]), len(classes["test"])) == (7, 3)
    assert classes["train"] | classes["test"] == set("abcdefghij")
    assert {(s.split, s.role) for s in samples} == {("train", "train"), ("test", "both")}
    other = {s.class_name for s in read(folder_recipe(test_fraction=0.3, split_seed=1), tmp_path) if s.split == "test"}
    assert other != classes["test"]
    assert {s.split for s in read(folder_recipe(test_fraction=0), tmp_path)} == {"train"}


@pytest.mark.parametrize("around", [True, False])  # with a folder of its own name around everything, and without
def test_train_and_test_folders_are_the_splits(tmp_path, around: bool) -> None:
    photos = tmp_path / "photos"
    class_folders(photos / "train", "abc")
    class_folders(photos / "test", "de")
    expected = [(f"train/{c}/{i}", c, "train", "train") for c in "abc" for i in ("0.png", "1.PNG")]
    expected += [(f"test/{c}/{i}", c, "test", "both") for c in "de" for i in ("0.png", "1.PNG")]
    root, base = (tmp_path, "photos") if around else (photos, ".")
    archive = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", root, base))
    for source in (photos, archive):
        assert [row[:4] for row in listed(folder_recipe(), source)] == expected
    class_folders(photos, "x")
    with pytest.raises(InputError, match="holds train/, test/ and also x/"):
        read(folder_recipe(), photos)


def test_images_outside_of_class_folders_are_refused(tmp_path) -> None:
    class_folders(tmp_path, "ab")
    with pytest.raises(InputError, match="a/0.png lies beside the class folders"):
        read(folder_recipe(depth=2), tmp_path)
    write(tmp_path / "a" / "deep" / "readme.txt", b"")
    assert len(read(folder_recipe(), tmp_path)) == 4
    write(tmp_path / "a" / "deep" / "x.jpg", noise(0))
    with pytest.raises(InputError, match="lies in the subfolder deep/ of the class folder a/; a class is one folder"):
        read(folder_recipe(), tmp_path)
