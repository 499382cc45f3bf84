"""A folder of images that is not packed, for embedding.

An image's id is its place in the sorted list of paths, its class the folder that it lies in. Legend as in ``stream``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dist_obdsd.config import Config
from dist_obdsd.data.decoding_workers import DecodeJob, DecodeTask
from dist_obdsd.data.packing.readers.base import images_among
from dist_obdsd.data.packing.sources import File, walk
from dist_obdsd.data.stream import EvalBatch, decoded_batches, near_equal
from dist_obdsd.errors import InputError, RunError


@dataclass(frozen=True)
class ImageFolder:
    files: list[File]
    """Sorted by name; an image's id is its place here."""

    @property
    def paths(self) -> list[str]:
        """Names relative to the root, with forward slashes."""
        return [file.name for file in self.files]

    @property
    def classes(self) -> list[str]:
        """Each image's folder, relative to the root; empty if all lie in one folder."""
        folders = [path.rpartition("/")[0] for path in self.paths]
        return folders if len(set(folders)) > 1 else []


def find_images(root: Path, log: bool = True) -> ImageFolder:
    """List all images below a folder as ``pack`` does: none hidden, links followed.

    With ``log`` it is told how many other files there are.

    Raises:
        InputError: there is no such folder, no image in it, or a folder in it cannot be read.
    """
    root = root.expanduser()
    if not root.is_dir():
        raise InputError(f"{root} is not a folder; give the folder that holds the images")
    files = images_among(walk(root), log)
    if not files:
        raise InputError(f"{root} holds no image of a kind that is read; give the folder that holds the images")
    return ImageFolder(sorted(files, key=lambda file: file.name))


def folder_batches(
    folder: ImageFolder, config: Config, rank: int, world_size: int, broken: dict[int, str] | None = None
) -> Iterator[EvalBatch]:
    """Yield this rank's share, in batches that do not depend on the number of ranks.

    Args:
        broken: is filled with id and reason of each image that cannot be read or decoded, which is then left out;
            None: such an image is an error.

    Raises:
        RunError: an image cannot be read or decoded.
    """
    size = near_equal(len(folder.files), config.evaluation.batch_size)
    starts = range(0, len(folder.files), size)[rank::world_size]

    def leave_out(image_id: int, reason: str) -> None:
        if broken is None:
            raise RunError(
                f"the image {folder.files[image_id].where} cannot be {reason}; mend it or move it out of the folder, "
                f"or leave such images out with --skip-broken"
            )
        broken[image_id] = reason

    def jobs() -> Iterator[DecodeJob]:
        for start in starts:
            tasks = []
            for image_id, file in enumerate(folder.files[start : start + size], start):
                try:
                    tasks.append(DecodeTask(image_id, file.read(), None))
                except OSError as error:
                    leave_out(image_id, f"read: {error.strerror}")
            if tasks:
                yield DecodeJob([(task.id, 0, "both") for task in tasks], tasks)

    return decoded_batches(jobs(), size, config, lambda i, why: leave_out(i, f"decoded: {why}")) if starts else iter(())
