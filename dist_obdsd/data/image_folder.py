"""A folder of images that is not packed, for embedding.

An image's id is its place in the sorted list of paths, its class the folder that it lies in. Legend as in ``stream``.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dist_obdsd.config import Config
from dist_obdsd.data.decoding_workers import DecodeJob, Decoder, DecodeTask
from dist_obdsd.data.images import IMAGE_SUFFIXES
from dist_obdsd.data.stream import EvalBatch, near_equal
from dist_obdsd.errors import InputError, RunError


@dataclass(frozen=True)
class ImageFolder:
    root: Path
    paths: list[str]
    """Relative, with forward slashes, sorted; an image's id is its place here."""

    @property
    def classes(self) -> list[str]:
        """Each image's folder, relative to the root; empty if all images lie in one folder, so there are no classes."""
        folders = [path.rpartition("/")[0] for path in self.paths]
        return folders if len(set(folders)) > 1 else []


def find_images(root: Path) -> ImageFolder:
    """All images below a folder, hidden files and folders left out.

    Raises:
        InputError: there is no such folder, or no image in it.
    """
    if not root.is_dir():
        raise InputError(f"{root} is not a folder; give the folder that holds the images")
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        here = Path(folder).relative_to(root)
        paths += [
            (here / name).as_posix()
            for name in names
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
        ]
    if not paths:
        raise InputError(f"{root} holds no image ({', '.join(IMAGE_SUFFIXES)}); give the folder that holds the images")
    return ImageFolder(root, sorted(paths))


def folder_batches(folder: ImageFolder, config: Config, rank: int, world_size: int) -> Iterator[EvalBatch]:
    """This rank's share, in near-equal batches that do not depend on the number of ranks.

    Raises:
        RunError: an image cannot be read or decoded. Nothing is left out silently.
    """
    size = near_equal(len(folder.paths), config.evaluation.batch_size)
    starts = range(0, len(folder.paths), size)[rank::world_size]

    def jobs() -> Iterator[DecodeJob]:
        for start in starts:
            tasks = []
            for image_id, path in enumerate(folder.paths[start : start + size], start):
                try:
                    tasks.append(DecodeTask(image_id, (folder.root / path).read_bytes(), None))
                except OSError as error:
                    raise RunError(f"cannot read the image {folder.root / path}: {error.strerror}") from error
            yield DecodeJob([task.id for task in tasks], tasks)

    if not starts:
        return
    decoder = Decoder(jobs(), size, config, 1)
    try:
        for decoded in decoder:
            for failure in decoded.failures:
                raise RunError(
                    f"the image {folder.root / folder.paths[failure.id]} cannot be decoded: {failure.reason}; "
                    f"mend it or move it out of the folder"
                )
            ids = torch.tensor(decoded.meta)
            yield EvalBatch(decoded.images, ids, torch.zeros_like(ids), ("both",) * len(ids))
    finally:
        decoder.close()
