"""Every benchmark's recipe on a small data set in the layout of its official download."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from dist_obdsd.data.packing.pack import pack
from dist_obdsd.data.packing.recipes import Recipe, load_recipe
from dist_obdsd.errors import InputError
from tests.data.packing.sources import Files, image, listed, write_archive, write_files


def part(files: Files, *starts: str) -> Files:
    return {name: data for name, data in files.items() if name.startswith(starts)}


def in_order(rows: Iterable[tuple[str, str, str]]) -> list[tuple[str, str, str, str]]:
    """Name, class, split and role of every sample, from name, class and role: training comes first."""
    found = [(name, label, "train" if role == "train" else "test", role) for name, label, role in rows]
    return sorted(found, key=lambda row: (row[2] != "train", row[1], row[0]))


# Two alphabets to train on and one to test on.
OMNIGLOT = [f"images_background/{a}/character0{c}/0{c}_0{i}.png" for a in "AB" for c in (1, 2) for i in (1, 2)]
OMNIGLOT += [f"images_evaluation/C/character0{c}/0{c}_0{i}.png" for c in (1, 2) for i in (1, 2)]
OMNIGLOT_FILES = {name: image(i) for i, name in enumerate(OMNIGLOT)}


def omniglot_zips(folder: Path) -> Path:
    for half in ("images_background", "images_evaluation"):
        more = {f"{half}/__MACOSX/x.png": b"", f"{half}/A/.DS_Store": b""}  # as macOS leaves them
        write_archive(folder / f"{half}.zip", part(OMNIGLOT_FILES, half) | more)
    return folder


BIRDS = ["099.Ovenbird", "100.Brown_Pelican", "101.White_Pelican", "102.Western_Wood_Pewee"]
CUB = [f"{name}/{name[4:]}_{i:04d}_7961{i}.jpg" for name in BIRDS for i in (1, 2)]
CUB_FILES = {f"CUB_200_2011/images/{path}": image(i) for i, path in enumerate(CUB)} | {
    "CUB_200_2011/images.txt": "".join(f"{i} {path}\n" for i, path in enumerate(CUB, 1)).encode(),
    "CUB_200_2011/README": b"birds",
    "CUB_200_2011/._images.txt": b"\0",  # as macOS leaves them
    "attributes.txt": b"1 has_bill_shape::curved\n",
}


CARS = [(1, 14), (2, 3), (3, 98), (4, 99), (5, 196), (6, 3), (7, 14)]  # image and class
MODELS = np.array([[f"Make {number} Sedan 2012" for number in range(1, 197)]], dtype=object)


def matlab(**variables: object) -> bytes:
    stream = io.BytesIO()
    savemat(stream, variables)
    return stream.getvalue()


def annotations(rows: list[dict[str, Any]], **more: object) -> bytes:
    array = np.empty((1, len(rows)), dtype=[(name, object) for name in rows[0]])
    array[0] = [tuple(row.values()) for row in rows]
    return matlab(annotations=array, **more)


def cars_in_one_folder(folder: Path) -> Path:
    rows = [{"relative_im_path": f"car_ims/{i:06d}.jpg", "bbox_x1": 1, "class": c, "test": i % 2} for i, c in CARS]
    write_archive(folder / "car_ims.tgz", {f"car_ims/{i:06d}.jpg": image(i) for i, _ in CARS})
    return write_files(folder, {"cars_annos.mat": annotations(rows, class_names=MODELS)})


def cars_in_two_halves(labels: str = "devkit/") -> Files:
    """``labels``: the folder of cars_test_annos_withlabels.mat, which is a download of its own."""
    files = {"devkit/cars_meta.mat": matlab(class_names=MODELS), "devkit/README.txt": b""}
    for half, cars, file in (
        ("cars_train", CARS[:4], "devkit/cars_train_annos.mat"),
        ("cars_test", CARS[4:], f"{labels}cars_test_annos_withlabels.mat"),
    ):
        files[file] = annotations([{"bbox_x1": 1, "class": c, "fname": f"{i:05d}.jpg"} for i, c in cars])
        files |= {f"{half}/{i:05d}.jpg": image(i) for i, _ in cars}
    return files


def car_archives(folder: Path) -> Path:
    files = cars_in_two_halves("")
    for name, start in (("cars_train", "cars_train/"), ("cars_test", "cars_test/"), ("car_devkit", "devkit/")):
        write_archive(folder / "cars" / f"{name}.tgz", part(files, start))
    write_files(folder / "cars", part(files, "cars_test_annos"))
    return folder


def mirrored_cars(folder: Path) -> Path:
    """As a mirror offers them: every archive extracted into a folder of its own name."""
    own = {"devkit": "car_devkit/", "cars_train": "cars_train/", "cars_test": "cars_test/"}
    files = cars_in_two_halves("")
    return write_files(folder, {own.get(name.split("/")[0], "") + name: data for name, data in files.items()})


PRODUCTS = {  # path, as the table writes it -> class
    "bicycle_final/111_1.JPG": 1, "bicycle_final/111_2.JPG": 1, "bicycle_final/112_3.JPG": 2,
    "chair_final/1111319_4.JPG": 11319, "chair_final/1111319_5.JPG": 11319,
}  # fmt: skip


def sop() -> Files:
    header = "image_id class_id super_class_id path\n"
    rows = [f"{i} {label} 1 {path}\n" for i, (path, label) in enumerate(PRODUCTS.items())]
    lists = {"train": rows[:3], "test": rows[3:], "info": rows}
    files = {f"Ebay_{name}.txt": "".join([header, *lines]).encode() for name, lines in lists.items()}
    files |= {path: image(i) for i, path in enumerate(PRODUCTS)}
    return {f"Stanford_Online_Products/{name}": data for name, data in files.items()}


CLOTHES = [  # path, item, role
    ("img/WOMEN/Dresses/id_00000002/02_1_front.jpg", "id_00000002", "train"),
    ("img/WOMEN/Dresses/id_00000002/02_2_side.jpg", "id_00000002", "train"),
    ("img/MEN/Denim/id_00000001/01_1_front.jpg", "id_00000001", "query"),
    ("img/MEN/Denim/id_00000001/01_2_side.jpg", "id_00000001", "gallery"),
    ("img/MEN/Denim/id_00000001/01_3_back.jpg", "id_00000001", "gallery"),
]


def inshop(text: str = "Eval/") -> Files:
    rows = "".join("   ".join(row) + "\n" for row in CLOTHES)
    table = f"{len(CLOTHES)}\nimage_name item_id evaluation_status\n{rows}".encode()
    files = {f"Img/{path}": image(i) for i, (path, _, _) in enumerate(CLOTHES)}
    return files | {f"{text}list_eval_partition.txt": table, "Anno/list_item_inshop.txt": b""}


def inshop_archive(folder: Path, images: str = "Img/", text: str = "Eval/") -> Path:
    files = inshop(text)
    pictures = {name.removeprefix("Img/"): data for name, data in part(files, "Img/").items()}
    write_archive(folder / f"{images}img.zip", pictures)
    return write_files(folder, part(files, f"{text}list_eval"))


WAYS = {
    "omniglot: zips": omniglot_zips,
    "omniglot: extracted": lambda folder: write_files(folder, OMNIGLOT_FILES),
    "cub200: archive": lambda folder: write_archive(folder / "CUB_200_2011.tgz", CUB_FILES),
    "cub200: its folder": lambda folder: write_archive(folder / "CUB_200_2011.tgz", CUB_FILES).parent,
    "cub200: extracted": lambda folder: write_files(folder, CUB_FILES),
    "cars196: below": car_archives,
    "cars196: extracted": lambda folder: write_files(folder, cars_in_two_halves()),
    "cars196: one archive": lambda folder: write_archive(folder / "cars.tar", cars_in_two_halves()),
    "cars196: mirror": mirrored_cars,
    "cars196: one folder": cars_in_one_folder,
    "sop: archive": lambda folder: write_archive(folder / "Stanford_Online_Products.zip", sop()),
    "inshop: below": lambda folder: inshop_archive(folder / "In-shop Clothes Retrieval Benchmark").parent,
    "inshop: flat archive": lambda folder: inshop_archive(folder, "", ""),
    "inshop: Anno": lambda folder: inshop_archive(folder, "Img/", "Anno/"),
    "inshop: extracted": lambda folder: write_files(folder, inshop()),
}


def role_of(trains: bool) -> str:
    return "train" if trains else "both"


EXPECTED = {
    "omniglot": [(name, "/".join(name.split("/")[1:3]), role_of("background" in name)) for name in OMNIGLOT],
    "cub200": [(f"images/{path}", path.split("/")[0], role_of(int(path[:3]) <= 100)) for path in CUB],
    "cars196": [
        (f"cars_{'train' if i <= 4 else 'test'}/{i:05d}.jpg", f"Make {c} Sedan 2012", role_of(c <= 98)) for i, c in CARS
    ],
    "cars196: one folder": [(f"car_ims/{i:06d}.jpg", f"Make {c} Sedan 2012", role_of(c <= 98)) for i, c in CARS],
    "sop": [(path, str(label), role_of(label < 11319)) for path, label in PRODUCTS.items()],
    "inshop": CLOTHES,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_download_is_read_as_it_comes(tmp_path, way: str) -> None:
    benchmark = way.split(":")[0]
    found = listed(load_recipe(benchmark), WAYS[way](tmp_path))
    assert [row[:4] for row in found] == in_order(EXPECTED.get(way, EXPECTED[benchmark]))
    images = {image(i) for i in range(12)}
    assert len({row[4] for row in found} & images) == len(found)  # all images, each with its own bytes


@pytest.mark.parametrize(
    ("row", "where"),
    [
        (
            {"class": 197, "fname": "00001.jpg"},
            r"annotations\(1\): class 197 has no name; there are names for 1 to 196",
        ),
        ({"class": 3, "fname": 5.5}, r"annotations\(1\): fname is empty or no text"),
        ({"class": "AM", "fname": "00001.jpg"}, r"annotations\(1\): the class 'AM' does not begin with a number"),
        ({"class": 3, "file": "00001.jpg"}, "no column relative_im_path or fname but class, file"),
    ],
)
def test_an_annotation_that_cannot_be_used_is_named(tmp_path, row: dict[str, object], where: str) -> None:
    files = cars_in_two_halves() | {"devkit/cars_train_annos.mat": annotations([row])}
    with pytest.raises(InputError, match=where):
        listed(load_recipe("cars196"), write_files(tmp_path, files))
    files["devkit/cars_meta.mat"] = matlab(names=MODELS)
    with pytest.raises(InputError, match="cars_meta.mat has no variable class_names"):
        listed(load_recipe("cars196"), write_files(tmp_path, files))


def test_missing_images_are_refused_or_recorded(tmp_path, caplog) -> None:
    source = write_files(tmp_path / "source", CUB_FILES)
    second, fifth = (f"CUB_200_2011/images/{CUB[i]}" for i in (1, 4))
    (source / second).unlink()
    (source / fifth).unlink()
    recipe = Recipe.model_validate(load_recipe("cub200").model_dump() | {"expected": {}})
    clause = f"CUB_200_2011/images.txt:2: the image {CUB[1]} is not there"
    with pytest.raises(InputError, match=rf"{clause} \(and 1 other images of this list\); complete the data, or"):
        pack(recipe, source, tmp_path / "out")
    write_files(source, {second: image(1)})
    packed = pack(recipe, source, tmp_path / "out", allow_partial=True)
    assert packed.recipe["differences"] == [f"CUB_200_2011/images.txt:5: the image {CUB[4]} is not there"]
    assert packed.recipe["partial"] is True
    assert (packed.images("train"), packed.images("test")) == (4, 3)
    assert caplog.records[0].getMessage().endswith("packing what is there")
