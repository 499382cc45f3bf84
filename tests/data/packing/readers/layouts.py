"""Small data sets in the layouts of the official downloads, as file name -> content."""

import io
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from scipy.io import savemat

from dist_obdsd.data.packing.readers.base import list_samples
from dist_obdsd.data.packing.recipes import Recipe
from tests.data.packing.sources import write
from tests.data.pictures import noise

Files = dict[str, bytes]


def image(seed: int) -> bytes:
    return noise(seed, "JPEG", (8, 8))


def matlab(**variables: object) -> bytes:
    stream = io.BytesIO()
    savemat(stream, variables)
    return stream.getvalue()


def struct_array(rows: list[dict[str, Any]]) -> np.ndarray:
    array = np.empty((1, len(rows)), dtype=[(name, object) for name in rows[0]])
    for i, row in enumerate(rows):
        array[0, i] = tuple(row.values())
    return array


def cell_array(texts: list[str]) -> np.ndarray:
    array = np.empty((1, len(texts)), dtype=object)
    array[0, :] = texts
    return array


def omniglot() -> Files:
    """Two alphabets to train on and one to test on."""
    names = [f"images_background/{a}/character0{c}/0{c}_0{i}.png" for a in "AB" for c in (1, 2) for i in (1, 2)]
    names += [f"images_evaluation/C/character0{c}/0{c}_0{i}.png" for c in (1, 2) for i in (1, 2)]
    return {name: image(i) for i, name in enumerate(names)}


def cub200() -> Files:
    """Classes 99 to 102 of two images each; the archive's own README, and what macOS leaves."""
    species = ["099.Ovenbird", "100.Brown_Pelican", "101.White_Pelican", "102.Western_Wood_Pewee"]
    paths = [f"{name}/{name[4:]}_{i:04d}_7961{i}.jpg" for name in species for i in (1, 2)]
    lines = "".join(f"{i} {path}\n" for i, path in enumerate(paths, 1))
    files = {f"CUB_200_2011/images/{path}": image(i) for i, path in enumerate(paths)}
    return files | {
        "CUB_200_2011/images.txt": lines.encode(),
        "CUB_200_2011/README": b"birds",
        "CUB_200_2011/._images.txt": b"\0",
        "attributes.txt": b"1 has_bill_shape::curved\n",
    }


CARS = [(1, 14), (2, 3), (3, 98), (4, 99), (5, 196), (6, 3), (7, 14)]
"""Image and class."""
CAR_NAMES = [f"Make {number} Sedan 2012" for number in range(1, 197)]


def cars_in_one_folder() -> Files:
    rows = [{"relative_im_path": f"car_ims/{i:06d}.jpg", "bbox_x1": 1, "class": c, "test": i % 2} for i, c in CARS]
    annotations = matlab(annotations=struct_array(rows), class_names=cell_array(CAR_NAMES))
    return {f"car_ims/{i:06d}.jpg": image(i) for i, _ in CARS} | {"cars_annos.mat": annotations}


def cars_in_two_halves(labels: str = "devkit/") -> Files:
    """``labels``: the folder of cars_test_annos_withlabels.mat, which is a download of its own."""
    files = {"devkit/cars_meta.mat": matlab(class_names=cell_array(CAR_NAMES)), "devkit/README.txt": b""}
    for half, cars, file in (
        ("cars_train", CARS[:4], "devkit/cars_train_annos.mat"),
        ("cars_test", CARS[4:], f"{labels}cars_test_annos_withlabels.mat"),
    ):
        rows = [{"bbox_x1": 1, "class": c, "fname": f"{i:05d}.jpg"} for i, c in cars]
        files[file] = matlab(annotations=struct_array(rows))
        files |= {f"{half}/{i:05d}.jpg": image(i) for i, _ in cars}
    return files


def sop() -> Files:
    header = "image_id class_id super_class_id path\n"
    train = "".join(f"{i} {c} 1 bicycle_final/11{c}_{i}.JPG\n" for i, c in ((1, 1), (2, 1), (3, 2)))
    test = "".join(f"{i} {c} 2 chair_final/11{c}_{i}.JPG\n" for i, c in ((4, 11319), (5, 11319)))
    files = {"Ebay_train.txt": (header + train).encode(), "Ebay_test.txt": (header + test).encode()}
    files["Ebay_info.txt"] = (header + train + test).encode()
    for line in (train + test).splitlines():
        files[line.split()[3]] = image(int(line.split()[0]))
    return {f"Stanford_Online_Products/{name}": data for name, data in files.items()}


def inshop() -> Files:
    rows = [
        ("WOMEN/Dresses/id_00000002/02_1_front.jpg", 2, "train"),
        ("WOMEN/Dresses/id_00000002/02_2_side.jpg", 2, "train"),
        ("MEN/Denim/id_00000001/01_1_front.jpg", 1, "query"),
        ("MEN/Denim/id_00000001/01_2_side.jpg", 1, "gallery"),
        ("MEN/Denim/id_00000001/01_3_back.jpg", 1, "gallery"),
    ]
    lines = "".join(f"img/{path}   id_{item:08d}  {role}\n" for path, item, role in rows)
    text = f"{len(rows)}\nimage_name item_id evaluation_status\n{lines}"
    files = {f"Img/img/{path}": image(i) for i, (path, _, _) in enumerate(rows)}
    return files | {"Eval/list_eval_partition.txt": text.encode(), "Anno/list_item_inshop.txt": b""}


def write_files(folder: Path, files: Files) -> Path:
    for name, data in files.items():
        write(folder / name, data)
    return folder


def write_archive(path: Path, files: Files | Sequence[tuple[str, bytes]]) -> Path:
    """A zip or a tar, compressed as its name says."""
    members = files.items() if isinstance(files, dict) else files
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as packed:
            for name, data in members:
                packed.writestr(name, data)
        return path
    mode = {".tgz": "w:gz", ".bz2": "w:bz2", ".xz": "w:xz", ".tar": "w"}[path.suffix]
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def part(files: Files, *starts: str) -> Files:
    return {name: data for name, data in files.items() if name.startswith(starts)}


def below(files: Files, folder: str) -> Files:
    """The files of a folder, as it looks from inside."""
    return {name.removeprefix(folder): data for name, data in part(files, folder).items()}


def listed(recipe: Recipe, source: Path | None) -> list[tuple[str, str, str, str, bytes]]:
    """Name, class, split, role and bytes of every sample."""
    with TemporaryDirectory() as scratch:
        samples = list_samples(recipe.make_reader(), source, Path(scratch))
        return [(s.name, s.class_name, s.split, s.role, s.read()) for s in samples]
