import shutil
from pathlib import Path

import pytest

from dist_obdsd.data.packing.recipes import Recipe, load_recipe, recipe_names
from dist_obdsd.errors import InputError
from tests.data.packing.sources import FOLDER, image, listed, write, write_files


def test_every_recipe_of_the_repository_loads() -> None:
    assert set(recipe_names()) >= {"glyphs", "omniglot", "folder"}
    for name in recipe_names():
        assert load_recipe(name).name == name
    with pytest.raises(InputError, match=r"no recipe 'omniglott'; did you mean omniglot\? recipes are .*glyphs"):
        load_recipe("omniglott")


SOUND = "name: x\nreader: folder\ndescription: d\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nreader: folder\n", "description is missing"),
        ("name: x\nreader: pictures\ndescription: d\n", "reader is 'pictures'; set it to one of glyphs, folder, table"),
        (f"{SOUND}speed: 1\n", "unknown key speed"),
        (f"{SOUND}options: {{fraction: 1}}\n", "unknown key options.fraction"),
        (f"{SOUND}options: {{test_fraction: 1.5}}\n", "options.test_fraction is 1.5"),
        (f"{SOUND}expected: {{train: {{images: -1, classes: 1}}}}\n", "expected.train"),
        ("- a\n", "not a mapping"),
        ("a: [\n", "not valid YAML"),
    ],
)
def test_a_recipe_with_a_mistake_is_refused(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(SOUND)
    assert load_recipe(path).name == "x"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_recipe(path)


@pytest.mark.parametrize(
    ("recipe", "source", "message"),
    [
        ("omniglot", None, "reads a download"),
        ("glyphs", ".", "draws its images"),
        ("folder", "none", "does not exist; give the folder or the archive"),
    ],
)
def test_a_source_that_is_missing_or_superfluous_is_refused(tmp_path, recipe, source, message) -> None:
    with pytest.raises(InputError, match=message):
        listed(load_recipe(recipe), source and tmp_path / source)


def class_folders(root: Path, names: str) -> Path:
    return write_files(root, {f"{name}/{file}": image(0) for name in names for file in ("0.png", "1.PNG")})


def test_a_folder_is_split_by_class_and_by_its_seed(tmp_path) -> None:
    class_folders(tmp_path, "abcdefghij")
    write_files(tmp_path, dict.fromkeys(("a/notes.txt", "a/.hidden.png", ".thumbs/x.png"), b"no image"))

    def split(**options: object) -> dict[str, set[str]]:
        rows = listed(Recipe(name="mine", reader="folder", description="", options=options), tmp_path)
        assert len(rows) == 20
        assert {row[2:4] for row in rows} <= {("train", "train"), ("test", "both")}
        return {side: {row[1] for row in rows if row[2] == side} for side in ("train", "test")}

    classes = split(test_fraction=0.3)
    assert (len(classes["train"]), len(classes["test"])) == (7, 3)
    assert classes["train"] | classes["test"] == set("abcdefghij")
    assert split(test_fraction=0.3, split_seed=1)["test"] != classes["test"]
    assert not split(test_fraction=0)["test"]


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
        assert [row[:4] for row in listed(FOLDER, source)] == expected
    class_folders(photos, "x")
    with pytest.raises(InputError, match="holds train/, test/ and also x/"):
        listed(FOLDER, photos)


def test_images_outside_of_class_folders_are_refused(tmp_path) -> None:
    class_folders(tmp_path, "ab")
    with pytest.raises(InputError, match="a/0.png lies beside the class folders"):
        listed(load_recipe("folder", ["options.depth=2"]), tmp_path)
    write(tmp_path / "a" / "deep" / "readme.txt", b"")
    assert len(listed(FOLDER, tmp_path)) == 4
    write(tmp_path / "a" / "deep" / "x.jpg", image(0))
    with pytest.raises(InputError, match="lies in the subfolder deep/ of the class folder a/; a class is one folder"):
        listed(FOLDER, tmp_path)
