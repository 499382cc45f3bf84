"""Packing of a data set into shards: tars of webdataset's convention, a manifest.

Everything is written into a folder beside the target and renamed at the end, so that a folder with a manifest is
complete whenever the program was stopped. Packing the same data twice gives the same bytes.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dist_obdsd import console
from dist_obdsd.data import manifest as manifests
from dist_obdsd.data.images import examine
from dist_obdsd.data.manifest import Manifest
from dist_obdsd.data.packing.readers.base import Sample, list_samples, raise_missing
from dist_obdsd.data.packing.recipes import Recipe
from dist_obdsd.data.packing.writer import UsableImage, write_shards
from dist_obdsd.data.parallel import in_order, processes
from dist_obdsd.errors import InputError, RunError, require
from dist_obdsd.files import new_folder, read_file

MAX_WARNINGS = 20  # about single images; the manifest lists all of them
AHEAD = 32  # images a process that are examined at a time

logger = logging.getLogger(__name__)


def pack(
    recipe: Recipe, source: Path | None, out: Path, *, seed: int = 0, samples_per_class: int = 2,
    resize: int | None = None, allow_partial: bool = False, overwrite: bool = False, workers: int = 1,
) -> Manifest:  # fmt: skip
    """Write the shards and the manifest of a data set; log what is left out.

    Args:
        recipe: says how the source is read.
        source: the download, its folder or an archive; None where the recipe needs none.
        out: the folder to make.
        seed: assigns images to shards; the split of the classes belongs to the recipe.
        samples_per_class: images of a class that training takes together (K); smaller training classes are left out.
        resize: shorter side in pixels to which larger images are reduced and encoded again; None copies every image
            byte for byte.
        allow_partial: pack what is there of a source that lacks listed files or differs from the recipe's expected
            counts, and record the differences in the manifest.
        overwrite: replace a packed folder, once the new one is complete.
        workers: processes that decode and write; 0 and 1 both mean none besides the caller's.

    Returns:
        The manifest as it was written.

    Raises:
        InputError: the source does not fit the recipe, or the target cannot be used.
        RunError: the disk is full, or a file of the source is gone meanwhile.
    """
    require("samples per class", samples_per_class, samples_per_class > 1, "at least 2, the images of a group")
    require("resize", resize, resize is None or resize > 0, "the shorter side in pixels, at least 1")
    out = out.resolve()
    _check_target(out, source, overwrite)
    reader, differences = recipe.make_reader(), list[str]()
    on_missing = differences.append if allow_partial else raise_missing
    try:
        # The processes first, so that they do not inherit the folder's lock, which ends with this process alone.
        with processes(workers) as pool, new_folder(out) as folder, TemporaryDirectory(dir=folder) as name:
            scratch = Path(name)
            samples = list_samples(reader, source, scratch, on_missing)
            record: dict[str, Any] = {**recipe.model_dump(), "options": reader.model_dump(), "resize": resize}
            _check_classes(samples)
            if counts := _count_differences(recipe, samples):
                on_missing(", and ".join(counts))
            if differences:
                logger.warning("%s; packing what is there", ", and ".join(differences))
                record |= {"partial": True, "differences": differences}
            images, broken = _examine_all(samples, resize, pool, workers, scratch)
            _log_left_out("images", broken)
            trains = any(sample.split == "train" for sample in samples)
            images, too_small = _drop_small_classes(images, samples_per_class, trains)
            if broken or too_small:
                record["left_out"] = broken + too_small
            splits, classes = write_shards(images, samples_per_class, seed, folder, pool, workers)
            text = manifests.to_json(Manifest(record, seed, samples_per_class, classes, splits))
            written = manifests.from_json(text, str(out / "manifest.json"))
            (folder / "manifest.json").write_text(text)
    except OSError as error:
        where = f" at {error.filename}" if error.filename else ""
        raise RunError(
            f"packing to {out} stopped{where}: {error.strerror or error}; nothing was kept; free some space, or "
            f"choose an --out that you may write to"
        ) from error
    return written


def _check_target(out: Path, source: Path | None, overwrite: bool) -> None:
    if source is not None and out.is_relative_to(source.resolve()):
        raise InputError(f"--out {out} lies inside the source {source}; choose a folder outside of it")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; choose a folder")
    present = sorted(path.name for path in out.iterdir()) if out.exists() else []
    if present and "manifest.json" not in present:
        raise InputError(f"--out {out} is not empty and holds no shards; choose another --out")
    if present and not overwrite:
        raise InputError(f"{out} is already packed; remove it or choose another --out")
    if foreign := [name for name in present if name != "manifest.json" and not name.endswith(".tar")]:
        raise InputError(f"{out} also holds {foreign[0]}, which is no shard; move it away before overwriting")


def _check_classes(samples: Sequence[Sample]) -> None:
    train, test = ({s.class_name for s in samples if s.split == split} for split in ("train", "test"))
    if both := sorted(train & test):
        raise InputError(
            f"{len(both)} classes are in training and in test, such as {both[0]!r}; "
            f"retrieval is measured on classes never seen, so give each class to one side"
        )


def _count_differences(recipe: Recipe, samples: Sequence[Sample]) -> list[str]:
    """Compare with the recipe's expected counts; each difference is one clause."""
    found = []
    for split, expected in recipe.expected.items():
        for role, count in {"": expected, **expected.roles}.items():
            names = [s.class_name for s in samples if s.split == split and role in ("", s.role)]
            if (len(names), len(set(names))) != (count.images, count.classes):
                found.append(
                    f"{split}{f' ({role})' if role else ''} has {len(names)} images of {len(set(names))} classes "
                    f"but the recipe {recipe.name} expects {count.images} of {count.classes}"
                )
    return found


def _examine_all(
    samples: Sequence[Sample], resize: int | None, pool: Executor | None, workers: int, scratch: Path
) -> tuple[list[UsableImage], list[dict[str, str]]]:
    """Decode all: the usable images, and name and reason of each other one."""
    images: list[UsableImage] = []
    left_out: list[dict[str, str]] = []
    examine_one = partial(_examine, resize=resize, scratch=scratch)
    with console.bar(len(samples), "images", "examining") as bar:
        examined = in_order(pool, examine_one, enumerate(samples), AHEAD * workers)
        for sample, found in zip(samples, examined, strict=True):
            bar.update(1)
            if isinstance(found, str):
                left_out.append({"name": sample.name, "reason": found})
            else:
                images.append(found)
    return images, left_out


def _examine(task: tuple[int, Sample], resize: int | None, scratch: Path) -> UsableImage | str:
    """Examine an image, and keep a smaller one; a text says why it cannot be used."""
    number, sample = task
    try:
        data = sample.read()
        suffix, smaller = examine(data, resize)
    except OSError as error:
        return f"cannot be read: {error}"
    except ValueError as error:
        return f"cannot be decoded: {error}"
    if smaller is None:
        return UsableImage(sample, suffix, len(data))
    path = scratch / str(number)
    path.write_bytes(smaller)
    return UsableImage(replace(sample, read=partial(read_file, path)), suffix, len(smaller))


def _drop_small_classes(
    images: list[UsableImage], samples_per_class: int, trains: bool
) -> tuple[list[UsableImage], list[dict[str, str]]]:
    """Leave out training classes too small for a group.

    Without any training image, usable or not (``trains``), test images alone will do.
    """
    test_classes = {image.sample.class_name for image in images if image.sample.split == "test"}
    sizes = Counter(image.sample.class_name for image in images if image.sample.split == "train")
    small = {name: size for name, size in sizes.items() if size < samples_per_class}
    left_out = [
        {"class": name, "reason": f"{size} usable images, fewer than {samples_per_class} samples per class"}
        for name, size in sorted(small.items())
    ]
    _log_left_out("training classes", left_out)
    if (trains or not test_classes) and len(sizes) - len(small) < 2:
        drawn = "where the source does not say which, options.test_fraction=0.5 takes half of them"
        raise InputError(
            f"the source has {len(sizes) - len(small)} training classes with {samples_per_class} usable images or "
            f"more; training needs at least 2"
            + (f" ({len(test_classes)} others are for testing: {drawn})" if test_classes else "")
        )
    return [image for image in images if image.sample.class_name not in small], left_out


def _log_left_out(what: str, left_out: Sequence[dict[str, str]]) -> None:
    for entry in left_out[:MAX_WARNINGS]:
        logger.warning("left out %s: %s", *entry.values())
    if len(left_out) > MAX_WARNINGS:
        logger.warning("left out %d %s in all; the manifest lists them", len(left_out), what)
