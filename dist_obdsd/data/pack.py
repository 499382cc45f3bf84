"""Pack a data set into shards: tars in webdataset's convention and a manifest, whole or not at all.

Everything is written into ``OUT.packing`` beside the target and renamed at the end, so that a folder with a manifest
is complete whenever the program was stopped. Packing the same data twice gives the same bytes.
"""

import hashlib
import json
import os
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from webdataset import TarWriter

from dist_obdsd import progress
from dist_obdsd.data import manifest as manifests
from dist_obdsd.data.deal import FEWEST_GROUPS, FEWEST_IMAGES, deal_evenly, deal_training, shard_count
from dist_obdsd.data.imagefile import examine
from dist_obdsd.data.manifest import Manifest, Shard
from dist_obdsd.data.parallel import in_order, processes, threads
from dist_obdsd.data.readers import Sample, open_samples
from dist_obdsd.data.recipes import Recipe
from dist_obdsd.data.workshop import publish, storage_error, workshop, write_synced
from dist_obdsd.errors import InputError, RunError

MOST_REPORTED = 20  # warnings about single images; the manifest lists all of them
WRITERS = 4  # shards in memory at a time, of 64 MiB or somewhat more each
TOGETHER = 16  # images that go to a decoding process at a time
_Found = tuple[str, int, int, bytes | None]  # suffix, size, checksum and, where made smaller, bytes of an image


@dataclass(frozen=True)
class _Image:
    """A usable image: decoded once, to be read again when its shard is written."""

    sample: Sample
    suffix: str
    read: Callable[[], bytes]
    bytes: int
    checksum: int


def pack(
    recipe: Recipe,
    source: Path | None,
    out: Path,
    *,
    seed: int = 0,
    samples_per_class: int = 2,
    resize: int | None = None,
    allow_partial: bool = False,
    overwrite: bool = False,
    workers: int = 1,
    report: Callable[[str], None] = lambda message: None,
) -> Manifest:
    """Write the shards and the manifest of a data set.

    Args:
        recipe: how the source is read.
        source: folder of the download; None where the recipe needs none.
        out: the folder to make.
        seed: of the deal to shards; the split of the classes belongs to the recipe.
        samples_per_class: images of a class that training takes together (K); smaller training classes are left out.
        resize: shorter side in pixels to which larger images are reduced and encoded again; None copies every image
            byte for byte.
        allow_partial: pack a source that differs from the recipe's expected counts, and say so in the manifest.
        overwrite: replace a packed folder, once the new one is complete.
        workers: processes that decode and write; 0 and 1 both mean none besides the caller's.
        report: called with one sentence per warning.

    Returns:
        The manifest as it was written.

    Raises:
        InputError: the source does not fit the recipe, or the target cannot be used.
        RunError: the disk is full, or the source changed meanwhile.
    """
    if samples_per_class < 2:
        raise InputError(f"samples per class is {samples_per_class}; a group needs at least 2 images")
    if resize is not None and resize < 1:
        raise InputError(f"resize is {resize}; give the shorter side in pixels, at least 1")
    out = out.resolve()
    _check_target(out, source, overwrite)
    with open_samples(recipe.reader, recipe.reader_options(), source) as samples:
        record: dict[str, Any] = {**recipe.model_dump(), "options": recipe.reader_options().model_dump()}
        record["resize"] = resize
        _check_sides(samples)
        if differences := _differences(recipe, samples):
            if not allow_partial:
                raise InputError(
                    f"{differences}; download the data again, or pass --allow-partial to pack what is there"
                )
            report(f"{differences}; packing what is there")
            record["partial"] = True
        try:
            # The processes first, so that they do not inherit the workshop's lock, which ends with this process alone.
            with processes(workers) as pool, workshop(out) as folder:
                images, left_out = _examine_all(samples, resize, pool, workers, folder / "spool", report)
                images, too_small = _drop_small_classes(images, samples_per_class, report)
                if left_out or too_small:
                    record["left_out"] = left_out + too_small
                splits, classes = _write_shards(images, samples_per_class, seed, folder, pool, workers)
                (folder / "spool").unlink(missing_ok=True)
                text = manifests.to_json(Manifest(record, seed, samples_per_class, classes, splits))
                written = manifests.from_json(text, str(out / "manifest.json"))
                write_synced(folder / "manifest.json", text.encode())
                publish(folder, out)
        except OSError as error:
            raise storage_error(error, out) from error
    return written


def _check_target(out: Path, source: Path | None, overwrite: bool) -> None:
    if source is not None and out.is_relative_to(source.resolve()):
        raise InputError(f"--out {out} lies inside the source {source}; choose a folder outside of it")
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"--out {out} is a file; choose a folder")
    present = {path.name for path in out.iterdir()}
    if "manifest.json" not in present:
        if present:
            raise InputError(f"--out {out} is not empty and holds no shards; choose another --out")
        return
    if not overwrite:
        raise InputError(f"{out} is already packed; remove it or choose another --out")
    foreign = sorted(name for name in present if name != "manifest.json" and not name.endswith(".tar"))
    if foreign:
        raise InputError(f"{out} also holds {foreign[0]}, which is no shard; move it away before overwriting")


def _check_sides(samples: Sequence[Sample]) -> None:
    splits = defaultdict(set)
    for sample in samples:
        splits[sample.class_name].add(sample.split)
    if both := sorted(name for name, found in splits.items() if len(found) > 1):
        raise InputError(
            f"{len(both)} classes are in training and in test, such as {both[0]!r}; "
            f"retrieval is measured on classes never seen, so give each class to one side"
        )


def _differences(recipe: Recipe, samples: Sequence[Sample]) -> str:
    """What differs from the recipe's expected counts, as one clause; empty where nothing does."""
    images = Counter(sample.split for sample in samples)
    classes = Counter(split for split, _ in {(sample.split, sample.class_name) for sample in samples})
    found = [
        f"{split} has {images[split]} images of {classes[split]} classes but the recipe {recipe.name} expects "
        f"{expected.images} of {expected.classes}"
        for split, expected in recipe.expected.items()
        if (images[split], classes[split]) != (expected.images, expected.classes)
    ]
    return ", and ".join(found)


def _examine_all(
    samples: Sequence[Sample],
    resize: int | None,
    pool: Executor | None,
    workers: int,
    spool: Path,
    report: Callable[[str], None],
) -> tuple[list[_Image], list[dict[str, str]]]:
    """Decode every image. Those made smaller wait in the spool file, the others stay where they are.

    Returns:
        The usable images, and name and reason of each other one.
    """
    images: list[_Image] = []
    left_out: list[dict[str, str]] = []
    parts = [samples[start : start + TOGETHER] for start in range(0, len(samples), TOGETHER)]
    with (
        threads(workers) as readers,
        progress.bar(len(samples), "images", "examining") as bar,
        spool.open("w+b") as file,
    ):
        look = partial(_look_at, resize=resize, pool=pool)
        for part, results in zip(parts, in_order(readers, look, parts, 2 * workers), strict=True):
            for sample, found in zip(part, results, strict=True):
                if isinstance(found, str):
                    left_out.append({"name": sample.name, "reason": found})
                    if len(left_out) <= MOST_REPORTED:
                        report(f"left out {sample.name}: {found}")
                    continue
                suffix, size, checksum, smaller = found
                read = sample.read
                if smaller is not None:
                    read = partial(_read_at, spool, file.tell(), size)
                    file.write(smaller)
                images.append(_Image(sample, suffix, read, size, checksum))
            bar.update(len(part))
    if len(left_out) > MOST_REPORTED:
        report(f"left out {len(left_out)} images in all; the manifest lists them")
    return images, left_out


def _look_at(samples: Sequence[Sample], resize: int | None, pool: Executor | None) -> list[_Found | str]:
    """Read some images here, since an archive is open in this process alone, and decode them in another one."""
    data = [_read(sample) for sample in samples]
    return pool.submit(_examine, data, resize).result() if pool else _examine(data, resize)


def _read(sample: Sample) -> bytes | str:
    try:
        return sample.read()
    except Exception as error:
        # Archives raise errors of their own for a damaged entry; like a damaged image, it costs this image only.
        return f"cannot be read: {' '.join(str(error).split()) or type(error).__name__}"


def _examine(encoded: list[bytes | str], resize: int | None) -> list[_Found | str]:
    """What was found of each image, or why it cannot be used."""
    results: list[_Found | str] = []
    for data in encoded:
        if isinstance(data, str):
            results.append(data)
            continue
        try:
            suffix, smaller = examine(data, resize)
        except ValueError as error:
            results.append(f"cannot be decoded: {error}")
            continue
        final = data if smaller is None else smaller
        results.append((suffix, len(final), zlib.crc32(final), smaller))
    return results


def _read_at(path: Path, start: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(size)


def _drop_small_classes(
    images: list[_Image], samples_per_class: int, report: Callable[[str], None]
) -> tuple[list[_Image], list[dict[str, str]]]:
    """Leave out training classes that cannot fill one group, and name test classes with nothing to retrieve."""
    alone = Counter(image.sample.class_name for image in images if image.sample.split == "test")
    lonely = sorted(name for name, size in alone.items() if size == 1)
    if lonely:
        report(
            f"{len(lonely)} test classes have one image, which finds no match and stays in the gallery alone: "
            + ", ".join(lonely[:MOST_REPORTED])
        )
    sizes = Counter(image.sample.class_name for image in images if image.sample.split == "train")
    small = {name: size for name, size in sizes.items() if size < samples_per_class}
    left_out = []
    for name, size in sorted(small.items()):
        reason = f"{size} usable images, fewer than {samples_per_class} samples per class"
        left_out.append({"class": name, "reason": reason})
        if len(left_out) <= MOST_REPORTED:
            report(f"left out the training class {name}: {reason}")
    if len(left_out) > MOST_REPORTED:
        report(f"left out {len(left_out)} training classes in all; the manifest lists them")
    if len(sizes) - len(small) < 2:
        raise InputError(
            f"the source has {len(sizes) - len(small)} training classes with {samples_per_class} usable images or "
            f"more; training needs at least 2"
        )
    return [image for image in images if image.sample.class_name not in small], left_out


def _write_shards(
    images: Sequence[_Image], samples_per_class: int, seed: int, folder: Path, pool: Executor | None, workers: int
) -> tuple[dict[str, tuple[Shard, ...]], tuple[str, ...]]:
    """Number the images and classes in their order, deal and write them."""
    classes = tuple(dict.fromkeys(image.sample.class_name for image in images))
    numbers = {name: number for number, name in enumerate(classes)}
    members: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, image in enumerate(images):
        members[image.sample.split][numbers[image.sample.class_name]].append(i)
    dealt: list[tuple[str, str, list[int]]] = []  # split, file, ids
    for split, by_class in members.items():
        size = sum(images[i].bytes for ids in by_class.values() for i in ids)
        if split == "train":
            groups = sum(len(ids) // samples_per_class for ids in by_class.values())
            count = shard_count(groups, size, FEWEST_GROUPS)
            hands = deal_training(by_class, samples_per_class, count, seed)
        else:
            ids = [i for ids in by_class.values() for i in ids]
            hands = deal_evenly(ids, shard_count(len(ids), size, FEWEST_IMAGES), seed, split)
        dealt += [(split, f"{split}-{n:06d}.tar", hand) for n, hand in enumerate(hands)]
    splits: dict[str, list[Shard]] = {split: [] for split in members}
    # Read here and written elsewhere, as above. Whole shards are on the way, so there are not many at a time.
    workers = min(workers, WRITERS)
    with threads(workers) as readers, progress.bar(len(images), "images", "writing") as bar:
        write = partial(_write_shard, folder=folder, images=images, numbers=numbers, pool=pool)
        written = in_order(readers, write, [(file, ids) for _, file, ids in dealt], workers)
        for (split, _, _), shard in zip(dealt, written, strict=True):
            splits[split].append(shard)
            bar.update(len(shard))
    return {split: tuple(shards) for split, shards in splits.items()}, classes


def _write_shard(
    task: tuple[str, list[int]],
    folder: Path,
    images: Sequence[_Image],
    numbers: dict[str, int],
    pool: Executor | None,
) -> Shard:
    name, ids = task
    classes = tuple(numbers[images[i].sample.class_name] for i in ids)
    rows = []
    for i, class_id in zip(ids, classes, strict=True):
        image = images[i]
        data = image.read()
        if zlib.crc32(data) != image.checksum:
            raise RunError(f"{image.sample.name} changed while it was packed; pack again when nothing writes there")
        rows.append((i, class_id, image.sample.name, image.suffix, data))
    path = folder / name
    size, sha256 = pool.submit(_write_tar, path, rows).result() if pool else _write_tar(path, rows)
    roles = tuple(images[i].sample.role for i in ids)
    return Shard(file=name, bytes=size, sha256=sha256, ids=tuple(ids), classes=classes, roles=roles)


class _Hashing:
    """Passes bytes on to a file and hashes them on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        return self.file.write(data)


def _write_tar(path: Path, rows: list[tuple[int, int, str, str, bytes]]) -> tuple[int, str]:
    """Write (id, class, name, suffix, image) in their order, down to the disk. Returns bytes and SHA-256."""
    with path.open("wb") as file:
        stream = _Hashing(file)
        # Nothing of the time, the user or the machine goes into the tar.
        with TarWriter(stream, user="", group="", mode=0o444, mtime=0, encoder=False) as tar:
            for i, class_id, name, suffix, data in rows:
                about = {"id": i, "class": class_id, "name": name}
                tar.write(
                    {
                        "__key__": manifests.key(i),
                        suffix: data,
                        "cls": str(class_id).encode(),
                        "json": json.dumps(about, sort_keys=True).encode(),
                    }
                )
        file.flush()
        os.fsync(file.fileno())
    return stream.bytes, stream.sha256.hexdigest()
