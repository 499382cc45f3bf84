"""Class folders: an image's class is the folder that it lies in."""

from typing import Annotated, Literal

from pydantic import Field

from dist_obdsd.data.packing.readers.base import FileReader, OnMissing, Sample, default_role, images_among
from dist_obdsd.data.packing.sources import File, Tree
from dist_obdsd.errors import InputError

SPLITS = {"train", "test"}


class FolderReader(FileReader):
    splits: Annotated[dict[Literal["train", "test"], str], Field(default_factory=dict)]
    """The folder of each split. Unset: train/ and test/ where the source has only these, else by class at random."""
    depth: Annotated[int, Field(ge=1)] = 1
    """Number of folders, one in another, that make a class."""

    def read(self, tree: Tree, on_missing: OnMissing) -> list[Sample]:
        if tree.given is not None:
            raise InputError(f"the source {tree.source} is neither a folder nor an archive; give one of these")
        images = images_among(tree.files())
        if self.splits:
            return self._read_splits(tree, images, on_missing)
        # An archive mostly holds one folder of its own name, which is no class.
        tops = {file.name.partition("/")[0] for file in images}
        base = f"{min(tops)}/" if tree.is_archive and len(tops) == 1 and not tops <= SPLITS else ""
        names = {file.name.removeprefix(base): file for file in images}
        tops = {name.partition("/")[0] for name in names if "/" in name}
        if tops <= SPLITS:
            return [
                _sample(name, self._class_name(rest, file), split, file)
                for name, file in names.items()
                for split, _, rest in [name.partition("/")]
            ]
        if tops >= SPLITS:
            raise InputError(
                f"{tree.source} holds train/, test/ and also {min(tops - SPLITS)}/; leave only train/ and test/, "
                f"or only class folders, so that it is clear what is a split and what a class"
            )
        classes = {name: self._class_name(name, file) for name, file in names.items()}
        held_out = self.test_classes(classes.values())
        return [
            _sample(name, classes[name], "test" if classes[name] in held_out else "train", file)
            for name, file in names.items()
        ]

    def _read_splits(self, tree: Tree, images: list[File], on_missing: OnMissing) -> list[Sample]:
        samples = []
        for split, folder in self.splits.items():
            starts = [f"{base}{folder}/" for base in tree.bases]
            start = next((start for start in starts if any(file.name.startswith(start) for file in images)), None)
            if start is None:
                packed = [archive for archive in self.archives if archive.startswith(folder)]
                on_missing(f"the source holds neither {' nor '.join([*packed, f'the folder {folder}'])} with images")
                continue
            for file in images:
                if file.name.startswith(start):
                    rest = file.name.removeprefix(start)
                    samples.append(_sample(f"{folder}/{rest}", self._class_name(rest, file), split, file))
        return samples

    def _class_name(self, name: str, file: File) -> str:
        """Return the class folders' names of CLASS/IMAGE."""
        *folders, _ = name.split("/")
        if len(folders) < self.depth:
            raise InputError(
                f"{file.where} lies beside the class folders; put every image into the folder of its class"
            )
        if len(folders) > self.depth:
            *above, inner = folders[: self.depth + 1]
            many = "one folder" if self.depth == 1 else f"{self.depth} folders deep"
            raise InputError(
                f"{file.where} lies in the subfolder {inner}/ of the class folder {'/'.join(above)}/; a class is "
                f"{many}, so move the images up or make {inner} a class of its own"
            )
        return "/".join(folders)


def _sample(name: str, class_name: str, split: str, file: File) -> Sample:
    return Sample(name, class_name, split, default_role(split), file.read)
