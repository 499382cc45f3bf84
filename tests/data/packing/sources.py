"""Small images and files for tests of packing."""

from pathlib import Path

import webdataset

from dist_obdsd.data.packing.recipes import Recipe

FOLDER = Recipe(name="mine", reader="folder", description="")


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def samples_of(folder: Path, shard: str) -> list[dict[str, bytes]]:
    """The samples as webdataset reads them."""
    return list(webdataset.tariterators.tarfile_samples([{"url": str(folder / shard)}]))
