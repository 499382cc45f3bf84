import io
import shutil
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from dist_obdsd.data.packing.readers import Sample, open_samples
from dist_obdsd.data.packing.recipes import Recipe, load_recipe, recipe_names
from dist_obdsd.errors import InputError
from tests.data.packing.sources import write


def png(value: int = 0, side: int = 8) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (side, side), value).save(stream, "PNG")
    return stream.getvalue()


def read(recipe: Recipe, source: Path | None) -> list[Sample]:
    with open_samples(recipe.make_reader(), source) as samples:
        return samples


def folder_recipe(**options: object) -> Recipe:
    return Recipe(name="mine", reader="folder", description="", options=options)


# --- recipes


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


# --- omniglot


def omniglot_files() -> dict[str, bytes]:
    """Two alphabets to train on and one to test on, in the official layout."""
    names = [
        *(f"images_background/{a}/character0{c}/0{c}_0{i}.png" for a in "BA" for c in (1, 2) for i in (2, 1)),
        *(f"images_evaluation/C/character0{c}/0{c}_0{i}.png" for c in (1, 2) for i in (1, 2)),
    ]
    return {name: png(i) for i, name in enumerate(names)}


def zip_parts(folder: Path, files: dict[str, bytes]) -> None:
    for part in ("images_background", "images_evaluation"):
        with zipfile.ZipFile(folder / f"{part}.zip", "w") as archive:
            for name, data in files.items():
                if name.startswith(part):
                    archive.writestr(name, data)


def test_omniglot_is_read_alike_from_zips_and_from_folders(tmp_path) -> None:
    files = omniglot_files()
    zips, folders = tmp_path / "zips", tmp_path / "folders"
    zips.mkdir()
    zip_parts(zips, files | {"images_background/__MACOSX/x.png": b"", "images_background/A/.DS_Store": b""})
    for name, data in files.items():
        write(folders / name, data)
    write(folders / "images_background/A/.hidden/x.png", b"")
    recipe = load_recipe("omniglot")
    rows = []
    for source in (zips, folders):
        with open_samples(recipe.make_reader(), source) as samples:
            rows.append([(s.name, s.class_name, s.split, s.role, s.read()) for s in samples])
    assert rows[0] == rows[1]
    assert [row[4] for row in rows[0]] == [files[row[0]] for row in rows[0]]
    assert rows[0][0][:4] == ("images_background/A/character01/01_01.png", "A/character01", "train", "train")
    assert rows[0][-1][1:4] == ("C/character02", "test", "both")
    assert [row[0] for row in rows[0]] == sorted(files)


def test_an_incomplete_omniglot_is_refused_or_allowed(tmp_path) -> None:
    recipe = load_recipe("omniglot")
    zip_parts(tmp_path, omniglot_files())
    (tmp_path / "images_evaluation.zip").unlink()
    with pytest.raises(InputError, match=r"neither images_evaluation.zip nor the folder .*; complete the data, or"):
        read(recipe, tmp_path)
    missing: list[str] = []
    with open_samples(recipe.make_reader(), tmp_path, missing.append) as samples:
        assert {s.split for s in samples} == {"train"}
    assert len(missing) == 1


def test_omniglot_images_lie_two_folders_deep(tmp_path) -> None:
    for name, data in omniglot_files().items():
        write(tmp_path / name, data)
    write(tmp_path / "images_background" / "A" / "1.png", png())
    with pytest.raises(InputError, match="A/1.png lies beside the class folders"):
        read(load_recipe("omniglot"), tmp_path)
    (tmp_path / "images_background" / "A" / "1.png").unlink()
    write(tmp_path / "images_background" / "A" / "character01" / "more" / "1.png", png())
    with pytest.raises(InputError, match="in the subfolder more/ of the class folder A/character01/; a class is 2 fol"):
        read(load_recipe("omniglot"), tmp_path)


# --- folder


def class_folders(root: Path, names: str, images: int = 2) -> None:
    for name in names:
        for i in range(images):
            write(root / name / f"{i}.{'PNG' if i else 'png'}", png())


def test_a_folder_is_split_by_class_and_by_its_seed(tmp_path) -> None:
    class_folders(tmp_path, "abcdefghij")
    write(tmp_path / "a" / "notes.txt", b"no image")
    write(tmp_path / "a" / ".hidden.png", b"")
    write(tmp_path / ".thumbs" / "x.png", b"")
    samples = read(folder_recipe(test_fraction=0.3), tmp_path)
    classes = {split: {s.class_name for s in samples if s.split == split} for split in ("train", "test")}
    assert len(classes["train"]) == 7
    assert len(classes["test"]) == 3
    assert classes["train"] | classes["test"] == set("abcdefghij")
    assert {(s.split, s.role) for s in samples} == {("train", "train"), ("test", "both")}
    assert len(samples) == 20
    other = {s.class_name for s in read(folder_recipe(test_fraction=0.3, split_seed=1), tmp_path) if s.split == "test"}
    assert other != classes["test"]
    assert {s.split for s in read(folder_recipe(test_fraction=0), tmp_path)} == {"train"}


def test_train_and_test_folders_are_the_splits(tmp_path) -> None:
    class_folders(tmp_path / "train", "abc")
    class_folders(tmp_path / "test", "de")
    samples = read(folder_recipe(), tmp_path)
    assert {(s.split, s.class_name) for s in samples} == {*(("train", c) for c in "abc"), *(("test", c) for c in "de")}
    assert samples[0].name == "train/a/0.png"
    class_folders(tmp_path, "x")
    with pytest.raises(InputError, match="holds train/, test/ and also x/"):
        read(folder_recipe(), tmp_path)


def test_images_outside_of_class_folders_are_refused(tmp_path) -> None:
    class_folders(tmp_path, "ab")
    write(tmp_path / "a" / "deep" / "readme.txt", b"")
    assert len(read(folder_recipe(), tmp_path)) == 4
    write(tmp_path / "a" / "deep" / "x.jpg", png())
    with pytest.raises(InputError, match="lies in the subfolder deep/ of the class folder a/; a class is one folder"):
        read(folder_recipe(), tmp_path)
    (tmp_path / "a" / "deep" / "x.jpg").unlink()
    write(tmp_path / "x.webp", png())
    with pytest.raises(InputError, match="lies beside the class folders"):
        read(folder_recipe(), tmp_path)


def test_class_folders_may_come_in_an_archive(tmp_path) -> None:
    class_folders(tmp_path / "photos" / "train", "abc")
    class_folders(tmp_path / "photos" / "test", "de")
    expected = [(s.name, s.class_name, s.split, s.role) for s in read(folder_recipe(), tmp_path / "photos")]
    assert len(expected) == 10
    # With a folder of its own name around everything, and without.
    for root in (tmp_path, tmp_path / "photos"):
        for kind in ("zip", "gztar", "tar"):
            archive = Path(
                shutil.make_archive(str(tmp_path / "packed"), kind, root, "photos" if root == tmp_path else ".")
            )
            found = read(folder_recipe(), archive)
            assert [(s.name, s.class_name, s.split, s.role) for s in found] == expected
            archive.unlink()
