"""Sources to pack, as file name -> content, and what a recipe reads of them."""

import io
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from dist_obdsd.data.packing.readers.base import list_samples
from dist_obdsd.data.packing.recipes import Recipe
from tests.data.pictures import noise

FOLDER = Recipe(name="mine", reader="folder", description="")
Files = dict[str, bytes]


def image(seed: int) -> bytes:
    return noise(seed, "JPEG", (8, 8))


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


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


def listed(recipe: Recipe, source: Path | None) -> list[tuple[str, str, str, str, bytes]]:
    """Name, class, split, role and bytes of every sample."""
    with TemporaryDirectory() as scratch:
        samples = list_samples(recipe.make_reader(), source, Path(scratch))
        return [(s.name, s.class_name, s.split, s.role, s.read()) for s in samples]
