import io
import shutil
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_obdsd.data.packing.readers import Sample, glyphs, open_samples
from dist_obdsd.data.packing.recipes import Recipe, load_recipe, recipe_names
from dist_obdsd.errors import InputError


def png(value: int = 0, side: int = 8) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (side, side), value).save(stream, "PNG")
    return stream.getvalue()


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


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


@pytest.mark.parametrize(
    "name", ["../x.png", "images_background/../../x.png", "/etc/x.png", "a\\..\\x.png", "C:/x.png"]
)
def test_an_archive_with_a_path_that_points_outside_is_refused(tmp_path, name: str) -> None:
    zip_parts(tmp_path, omniglot_files())
    assert len(read(load_recipe("omniglot"), tmp_path)) == 12
    with zipfile.ZipFile(tmp_path / "images_background.zip", "a") as archive:
        archive.writestr(name, png())
    with pytest.raises(InputError, match="points outside"):
        read(load_recipe("omniglot"), tmp_path)


def test_an_incomplete_or_broken_omniglot_is_refused(tmp_path) -> None:
    with pytest.raises(InputError, match=r"holds neither images_background.zip nor the folder"):
        read(load_recipe("omniglot"), tmp_path)
    zip_parts(tmp_path, omniglot_files())
    whole = (tmp_path / "images_evaluation.zip").read_bytes()
    (tmp_path / "images_evaluation.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"cannot open .*images_evaluation.zip.*download it again"):
        read(load_recipe("omniglot"), tmp_path)
    (tmp_path / "images_evaluation.zip").write_bytes(whole)
    write(tmp_path / "images_background" / "A" / "1.png", png())
    with pytest.raises(InputError, match="A/1.png lies beside the class folders"):
        read(load_recipe("omniglot"), tmp_path)
    (tmp_path / "images_background" / "A" / "1.png").unlink()
    write(tmp_path / "images_background" / "A" / "character01" / "more" / "1.png", png())
    with pytest.raises(InputError, match="in the subfolder more/ of the class folder A/character01/; a class is 2 fol"):
        read(load_recipe("omniglot"), tmp_path)


def test_the_real_omniglot_has_the_official_counts(real_data) -> None:
    samples = read(load_recipe("omniglot"), real_data / "omniglot")
    images = Counter(sample.split for sample in samples)
    classes = Counter(split for split, _ in {(sample.split, sample.class_name) for sample in samples})
    assert (images, classes) == ({"train": 19280, "test": 13180}, {"train": 964, "test": 659})
    assert set(Counter(sample.class_name for sample in samples).values()) == {20}


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


def test_omniglot_without_one_half_is_packed_where_that_is_allowed(tmp_path) -> None:
    zip_parts(tmp_path, omniglot_files())
    (tmp_path / "images_evaluation.zip").unlink()
    with pytest.raises(InputError, match=r"neither images_evaluation.zip nor the folder .*; complete the data, or"):
        read(load_recipe("omniglot"), tmp_path)
    missing: list[str] = []
    recipe = load_recipe("omniglot")
    with open_samples(recipe.make_reader(), tmp_path, missing.append) as samples:
        assert {s.split for s in samples} == {"train"}
    assert len(missing) == 1


# --- glyphs


@pytest.fixture(scope="module")
def drawn() -> list[tuple[str, str, str, bytes]]:
    return glyphs.draw_glyphs(0, 2)


def letters_of(rows: list[tuple[str, str, str, bytes]], split: str) -> set[str]:
    return {chr(int(name.split("/U+")[1].split("-")[0], 16)) for name, _, side, _ in rows if side == split}


def test_glyphs_are_about_twelve_thousand_images_on_each_side(drawn) -> None:
    images = Counter(row[2] for row in drawn)
    classes = {split: {row[1] for row in drawn if row[2] == split} for split in images}
    # The exact numbers depend on the last bit of the font renderer; these bounds do not.
    assert 11_500 < images["train"] < 13_000
    assert 11_500 < images["test"] < 13_000
    assert len(classes["train"]) > 400
    assert len(classes["test"]) > 550
    assert not classes["train"] & classes["test"]


def test_glyph_images_are_small_grey_and_all_different(drawn) -> None:
    images = [Image.open(io.BytesIO(row[3])) for row in drawn[::50]]
    assert {(image.size, image.mode) for image in images} == {((32, 32), "L")}
    assert len({row[3] for row in drawn}) == len(drawn)
    assert len({row[0] for row in drawn}) == len(drawn)
    ink = [int((np.asarray(image) > 128).sum()) for image in images]
    assert min(ink) > 0


def test_the_scripts_stand_on_their_sides(drawn) -> None:
    train, test = letters_of(drawn, "train"), letters_of(drawn, "test")
    assert set("ABCXYZabcxyzäñøşž") <= train
    assert set("ΔΨλξЖЩяюԱԲաბგდ") <= test
    assert not train & test
    assert all(ord(letter) > 0x24F for letter in test)


def test_letters_that_look_the_same_are_one_class_on_one_side(drawn) -> None:
    # Recomputed from single drawings, one face after the other, without the union that made the classes.
    class_of = {chr(int(n.split("/U+")[1].split("-")[0], 16)): (class_name, s) for n, class_name, s, _ in drawn}
    same = 0
    for face in glyphs.FACES:
        by_bitmap = defaultdict(set)
        for letter, (image, _) in glyphs._draw_face(face).items():
            if letter in class_of:
                by_bitmap[image.size, image.tobytes()].add(letter)
        for letters in by_bitmap.values():
            same += len(letters) - 1
            assert len({class_of[letter] for letter in letters}) == 1, letters
    assert same > 500  # the test saw look-alikes in plenty
    for latin, greek, cyrillic in ("AΑА", "OΟО", "HΗН", "oοо"):
        assert class_of[latin] == class_of[greek] == class_of[cyrillic]
        assert class_of[latin][1] == "train"
    assert class_of["A"][0] != class_of["B"][0]
    assert class_of["Ш"][0] != class_of["Щ"][0]


def test_only_faces_that_have_a_letter_draw_it(drawn) -> None:
    from matplotlib.ft2font import FT2Font

    maps = {face: FT2Font(str(glyphs._path(face))).get_charmap() for face in glyphs.FACES}
    faces = defaultdict(set)
    for name, class_name, _, _ in drawn:
        _, code, face, _ = name.removesuffix(".png").replace("-Bold", "_Bold").replace("-Oblique", "_Oblique").replace(
            "-Italic", "_Italic"
        ).replace("/", "-").split("-")  # fmt: skip
        face = face.replace("_", "-")
        assert int(code[2:], 16) in maps[face], name
        faces[class_name].add(face)
    assert min(map(len, faces.values())) >= glyphs.FEWEST_FACES
    assert any(len(found) < 12 for found in faces.values())  # some faces do lack some letters


def test_glyphs_are_drawn_alike_every_time(monkeypatch) -> None:
    monkeypatch.setattr(glyphs, "FACES", glyphs.FACES[4:8])  # some faces, for speed
    first = glyphs.draw_glyphs(0, 2)
    assert glyphs.draw_glyphs(0, 2) == first
    other = glyphs.draw_glyphs(1, 2)
    assert {row[3] for row in other} != {row[3] for row in first}
