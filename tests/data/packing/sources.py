"""Small images and files for tests of packing."""

import io
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from dist_obdsd.data.packing.recipes import Recipe

FOLDER = Recipe(name="mine", reader="folder", description="")


def encoded(seed: int, size: tuple[int, int] = (12, 10), kind: str = "PNG", **options: object) -> bytes:
    """Noise of a seed as an encoded image."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def samples_of(folder: Path, shard: str) -> list[dict[str, bytes]]:
    """The samples as webdataset reads them."""
    return list(webdataset.tariterators.tarfile_samples([{"url": str(folder / shard)}]))
