"""Class folders: an image's class is the folder that it lies in."""

from typing import Annotated, Literal

from pydantic import Field

from dist_obdsd.data.packing.readers.base import FileOptions, Lack, Sample, default_role, is_image, test_classes
from dist_obdsd.data.packing.sources import File, Tree
from dist_obdsd.errors import InputError

SPLITS = {"train", "test"}


class FolderOptions(FileOptions):
    splits: Annotated[dict[Literal["train", "test"], str], Field(default_factory=dict)]
    """The folder of each split. Unset: train/ and test/ where the source has only these, else by class at random."""
    depth: Annotated[int, Field(ge=1)] = 1
    """How many folders, one in another, make a class."""


def read_folder(tree: Tree, options: FolderOptions, lack: Lack) -> list[Sample]:
    if tree.given is not None:
        raise InputError(f"the source {tree.source} is neither a folder nor an archive; give one of these")
    images = [file for file in tree.files() if is_image(file.name)]
    if options.splits:
        return _of_split_folders(tree, images, options, lack)
    # An archive mostly holds one folder of its own name, which is no class.
    tops = {file.name.partition("/")[0] for file in images}
    base = f"{min(tops)}/" if tree.folder is None and len(tops) == 1 and not tops <= SPLITS else ""
    names = {file.name.removeprefix(base): file for file in images}
    tops = {name.partition("/")[0] for name in names if "/" in name}
    if tops <= SPLITS:
        return [
            Sample(name, _class_name(rest, file, options), split, default_role(split), file.read)
            for name, file in names.items()
            for split, _, rest in [name.partition("/")]
        ]
    if tops >= SPLITS:
        raise InputError(
            f"{tree.source} holds train/, test/ and also {min(tops - SPLITS)}/; leave only train/ and test/, "
            f"or only class folders, so that it is clear what is a split and what a class"
        )
    classes = {name: _class_name(name, file, options) for name, file in names.items()}
    held_out = test_classes(classes.values(), options)
    split_of = {name: "test" if class_name in held_out else "train" for name, class_name in classes.items()}
    return [
        Sample(name, classes[name], split_of[name], default_role(split_of[name]), file.read)
        for name, file in names.items()
    ]


def _of_split_folders(tree: Tree, images: list[File], options: FolderOptions, lack: Lack) -> list[Sample]:
    samples = []
    for split, folder in options.splits.items():
        starts = [f"{base}{folder}/" for base in tree.bases]
        start = next((start for start in starts if any(file.name.startswith(start) for file in images)), None)
        if start is None:
            packed = [archive for archive in options.archives if archive.startswith(folder)]
            lack(f"the source holds neither {' nor '.join([*packed, f'the folder {folder}'])} with images")
            continue
        for file in images:
            if file.name.startswith(start):
                rest = file.name.removeprefix(start)
                class_name = _class_name(rest, file, options)
                samples.append(Sample(f"{folder}/{rest}", class_name, split, default_role(split), file.read))
    return samples


def _class_name(name: str, file: File, options: FolderOptions) -> str:
    """The class folders' names of CLASS/IMAGE."""
    *folders, _ = name.split("/")
    if len(folders) < options.depth:
        raise InputError(f"{file.where} lies beside the class folders; put every image into the folder of its class")
    if len(folders) > options.depth:
        *above, inner = folders[: options.depth + 1]
        many = "one folder" if options.depth == 1 else f"{options.depth} folders deep"
        raise InputError(
            f"{file.where} lies in the subfolder {inner}/ of the class folder {'/'.join(above)}/; a class is {many}, "
            f"so move the images up or make {inner} a class of its own"
        )
    return "/".join(folders)
