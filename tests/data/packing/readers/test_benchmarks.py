"""Every benchmark's recipe on a small data set in the layout of its official download."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dist_obdsd.data.packing.pack import pack
from dist_obdsd.data.packing.recipes import Recipe, load_recipe
from dist_obdsd.errors import InputError
from tests.data.packing.readers import layouts
from tests.data.packing.readers.layouts import below, listed, part, write_archive, write_files

CUB = "CUB_200_2011/"
SOP = "Stanford_Online_Products/"


def cub_archive(folder: Path) -> Path:
    return write_archive(folder / "CUB_200_2011.tgz", layouts.cub200())


def car_archives(folder: Path) -> Path:
    files = layouts.cars_in_two_halves("")
    for name in ("cars_train", "cars_test"):
        write_archive(folder / f"{name}.tgz", part(files, f"{name}/"))
    write_archive(folder / "car_devkit.tgz", part(files, "devkit/"))
    return write_files(folder, part(files, "cars_test_annos"))


def mirrored_cars(folder: Path) -> Path:
    """As a mirror offers them: every archive extracted into a folder of its own name."""
    own = {"devkit/": "car_devkit/", "cars_train/": "cars_train/", "cars_test/": "cars_test/"}
    files = layouts.cars_in_two_halves("")
    return write_files(folder, {own.get(name[: name.find("/") + 1], "") + name: files[name] for name in files})


def car_folder_archive(folder: Path) -> Path:
    files = layouts.cars_in_one_folder()
    write_archive(folder / "car_ims.tgz", part(files, "car_ims/"))
    return write_files(folder, part(files, "cars_annos"))


def inshop_archive(folder: Path, images: str = "Img/", text: str = "Eval/") -> Path:
    files = layouts.inshop()
    write_archive(folder / f"{images}img.zip", below(files, "Img/"))
    return write_files(folder, {f"{text}list_eval_partition.txt": files["Eval/list_eval_partition.txt"]})


def omniglot_zips(folder: Path) -> Path:
    for half in ("images_background", "images_evaluation"):
        more = {f"{half}/__MACOSX/x.png": b"", f"{half}/A/.DS_Store": b""}  # as macOS leaves them
        write_archive(folder / f"{half}.zip", part(layouts.omniglot(), half) | more)
    return folder


Way = Callable[[Path], Path]
WAYS: dict[str, dict[str, Way]] = {
    "omniglot": {
        "zips": omniglot_zips,
        "extracted": lambda folder: write_files(folder, layouts.omniglot()),
    },
    "cub200": {
        "archive": cub_archive,
        "its folder": lambda folder: cub_archive(folder).parent,
        "extracted": lambda folder: write_files(folder, layouts.cub200()),
        "inside": lambda folder: write_files(folder, below(layouts.cub200(), CUB)),
    },
    "cars196": {
        "below": lambda folder: car_archives(folder / "cars").parent,
        "extracted": lambda folder: write_files(folder, layouts.cars_in_two_halves()),
        "one archive": lambda folder: write_archive(folder / "cars.tar", layouts.cars_in_two_halves()),
        "mirror": mirrored_cars,
    },
    "cars196 in one folder": {"archive": car_folder_archive},
    "sop": {
        "archive": lambda folder: write_archive(folder / "Stanford_Online_Products.zip", layouts.sop()),
        "inside": lambda folder: write_files(folder, below(layouts.sop(), SOP)),
    },
    "inshop": {
        "below": lambda folder: inshop_archive(folder / "In-shop Clothes Retrieval Benchmark").parent,
        "flat archive": lambda folder: inshop_archive(folder, "", ""),
        "Anno": lambda folder: inshop_archive(folder, "Img/", "Anno/"),
        "extracted": lambda folder: write_files(folder, layouts.inshop()),
    },
}

EXPECTED = {
    "omniglot": [
        (name, "/".join(name.split("/")[1:3]), *(("train", "train") if "background" in name else ("test", "both")))
        for name in layouts.omniglot()
    ],
    "cub200": [
        (f"images/{name}/{name[4:]}_{i:04d}_7961{i}.jpg", name, split, role)
        for name, split, role in (
            ("099.Ovenbird", "train", "train"),
            ("100.Brown_Pelican", "train", "train"),
            ("101.White_Pelican", "test", "both"),
            ("102.Western_Wood_Pewee", "test", "both"),
        )
        for i in (1, 2)
    ],
    "cars196": [
        ("cars_test/00007.jpg", "Make 14 Sedan 2012", "train", "train"),
        ("cars_train/00001.jpg", "Make 14 Sedan 2012", "train", "train"),
        ("cars_test/00006.jpg", "Make 3 Sedan 2012", "train", "train"),
        ("cars_train/00002.jpg", "Make 3 Sedan 2012", "train", "train"),
        ("cars_train/00003.jpg", "Make 98 Sedan 2012", "train", "train"),
        ("cars_test/00005.jpg", "Make 196 Sedan 2012", "test", "both"),
        ("cars_train/00004.jpg", "Make 99 Sedan 2012", "test", "both"),
    ],
    "sop": [
        ("bicycle_final/111_1.JPG", "1", "train", "train"),
        ("bicycle_final/111_2.JPG", "1", "train", "train"),
        ("bicycle_final/112_3.JPG", "2", "train", "train"),
        ("chair_final/1111319_4.JPG", "11319", "test", "both"),
        ("chair_final/1111319_5.JPG", "11319", "test", "both"),
    ],
    "inshop": [
        ("img/WOMEN/Dresses/id_00000002/02_1_front.jpg", "id_00000002", "train", "train"),
        ("img/WOMEN/Dresses/id_00000002/02_2_side.jpg", "id_00000002", "train", "train"),
        ("img/MEN/Denim/id_00000001/01_1_front.jpg", "id_00000001", "test", "query"),
        ("img/MEN/Denim/id_00000001/01_2_side.jpg", "id_00000001", "test", "gallery"),
        ("img/MEN/Denim/id_00000001/01_3_back.jpg", "id_00000001", "test", "gallery"),
    ],
}


@pytest.mark.parametrize(
    ("benchmark", "way"), [(name, way) for name, ways in WAYS.items() for way in ways], ids=lambda text: text
)
def test_a_download_is_read_as_it_comes(tmp_path, benchmark: str, way: str) -> None:
    source = WAYS[benchmark][way](tmp_path)
    recipe = load_recipe(benchmark.split()[0])
    found = listed(recipe, source)
    expected = EXPECTED[recipe.name]
    if benchmark == "cars196 in one folder":
        names = {i: f"car_ims/{i:06d}.jpg" for i, _ in layouts.CARS}
        expected = [(names[int(name[-9:-4])], *rest) for name, *rest in expected]
        expected.sort(key=lambda row: (row[2] != "train", row[1], row[0]))
    assert [row[:4] for row in found] == expected
    images = {layouts.image(i) for i in range(12)}
    assert len({row[4] for row in found} & images) == len(found)  # all images, each with its own bytes


@pytest.mark.parametrize(
    ("rows", "names", "where"),
    [
        ([{"class": 197, "fname": "00001.jpg"}], True, r"annotations\(1\): class 197 has no name; there are nam"),
        ([{"class": 3, "fname": 5.5}], True, r"annotations\(1\): fname is empty or no text"),
        ([{"class": "AM General", "fname": "00001.jpg"}], True, r"annotations\(1\): the class 'AM General' does not b"),
        ([{"class": 3, "file": "00001.jpg"}], True, "has no column relative_im_path or fname but class, file"),
        ([{"class": 3, "fname": "00001.jpg"}], False, "cars_meta.mat has no variable class_names"),
    ],
)  # fmt: skip
def test_an_annotation_that_cannot_be_used_is_named(tmp_path, rows: list, names: bool, where: str) -> None:
    files = layouts.cars_in_two_halves()
    files["devkit/cars_train_annos.mat"] = layouts.matlab(annotations=layouts.struct_array(rows))
    if not names:
        files["devkit/cars_meta.mat"] = layouts.matlab(names=[1])
    with pytest.raises(InputError, match=where):
        listed(load_recipe("cars196"), write_files(tmp_path, files))


def test_missing_images_are_refused_or_recorded(tmp_path, caplog) -> None:
    source = write_files(tmp_path / "source", layouts.cub200())
    for name in ("099.Ovenbird/Ovenbird_0002_79612.jpg", "101.White_Pelican/White_Pelican_0001_79611.jpg"):
        (source / CUB / "images" / name).unlink()
    recipe = Recipe.model_validate(load_recipe("cub200").model_dump() | {"expected": {}})
    clause = "CUB_200_2011/images.txt:2: the image 099.Ovenbird/Ovenbird_0002_79612.jpg is not there"
    with pytest.raises(InputError, match=rf"{clause} \(and 1 other images of this list\); complete the data, or"):
        pack(recipe, source, tmp_path / "out")
    write_files(source, {f"{CUB}images/099.Ovenbird/Ovenbird_0002_79612.jpg": layouts.image(2)})
    packed = pack(recipe, source, tmp_path / "out", allow_partial=True)
    assert packed.recipe["differences"] == [
        "CUB_200_2011/images.txt:5: the image 101.White_Pelican/White_Pelican_0001_79611.jpg is not there"
    ]
    assert packed.recipe["partial"] is True
    assert (packed.images("train"), packed.images("test")) == (4, 3)
    assert caplog.records[0].getMessage().endswith("packing what is there")
