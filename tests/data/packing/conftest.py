"""A source with six training classes of 9 images and three test classes of 5, and its packed folder."""

from pathlib import Path

import pytest

from dist_obdsd.data.packing.pack import pack
from tests.data.packing.sources import FOLDER, write
from tests.data.pictures import noise


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root, n = tmp_path / "source", 0
    for split, classes, images in (("train", "abcdef", 9), ("test", "xyz", 5)):
        for name in classes:
            for i in range(images):
                n += 1
                kind, suffix = ("JPEG", "jpeg") if i % 2 else ("PNG", "png")
                write(root / split / name / f"{i}.{suffix}", noise(n, kind=kind))
    return root


@pytest.fixture
def packed(source: Path, tmp_path: Path) -> Path:
    pack(FOLDER, source, tmp_path / "out")
    return tmp_path / "out"
