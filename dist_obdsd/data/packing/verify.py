"""Checks of shards against their manifest, to the last pixel."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO

from dist_obdsd import console
from dist_obdsd.data import manifest as manifests
from dist_obdsd.data.images import examine
from dist_obdsd.data.manifest import Shard, key
from dist_obdsd.data.packing.parallel import in_order, processes
from dist_obdsd.data.remote import is_remote
from dist_obdsd.data.shard_reader import (
    ShardError,
    images_of,
    open_shard,
    sample_faults,
    samples_of,
    short_reason,
)
from dist_obdsd.errors import RunError

logger = logging.getLogger(__name__)


def verify(root: str | Path, workers: int = 1) -> list[str]:
    """Read every shard: its size, SHA-256, keys, classes in order, and every image.

    Args:
        root: what ``pack`` wrote: a folder, or a URL or ``pipe:`` command. The cache is not used, since what it holds
            was checked.
        workers: processes; 0 and 1 both mean none besides the caller's.

    Returns:
        The problems, a sentence each, beginning with the shard's name. Each was logged when it was found.

    Raises:
        InputError: there is no manifest, or it contradicts itself.
        RunError: the manifest cannot be downloaded, or a process was killed.
    """
    root = str(root)
    manifest = manifests.load(root)
    shards = list(manifest.shards())
    problems: list[str] = []

    def add(problem: str) -> None:
        logger.warning("%s", problem)
        problems.append(problem)

    with processes(workers) as pool, console.bar(sum(map(len, shards)), "images", "verifying") as bar:
        checked = in_order(pool, partial(_check_shard, root), shards, 2 * workers)
        for shard, found in zip(shards, checked, strict=True):
            for problem in found:
                add(f"{shard.file}: {problem}")
            bar.update(len(shard))
    if not is_remote(root):
        listed = {shard.file for shard in shards}
        for name in sorted(str(path.relative_to(root)) for path in Path(root).rglob("*.tar")):
            if name not in listed:
                add(f"{name}: is not in the manifest; remove it or pack again")
    return problems


def _check_shard(root: str, shard: Shard) -> list[str]:
    try:
        with open_shard(root, shard) as file:
            return [*_check_bytes(file, shard), *_check_samples(file, shard)]
    except RunError as error:
        return [str(error)]  # of a download, which was checked on the way
    except FileNotFoundError:
        return ["is missing"]
    except OSError as error:
        return [f"cannot be read: {short_reason(error)}"]


def _check_bytes(file: IO[bytes], shard: Shard) -> Iterator[str]:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if size != shard.bytes:
        yield f"has {size} bytes but the manifest says {shard.bytes}"
        return
    digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    file.seek(0)
    if digest != shard.sha256:
        yield f"has SHA-256 {digest[:12]}... but the manifest says {shard.sha256[:12]}..."


def _check_samples(file: IO[bytes], shard: Shard) -> Iterator[str]:
    try:
        for sample, sample_id, class_id in zip(samples_of(file, shard), shard.ids, shard.classes, strict=True):
            for fault in (*sample_faults(sample, class_id), *_content_faults(sample, sample_id, class_id)):
                yield f"sample {key(sample_id)} {fault}"
    except ShardError as error:  # the samples after it would be reported, too
        yield str(error)


def _content_faults(sample: dict[str, bytes], sample_id: int, class_id: int) -> Iterator[str]:
    """Check what training does not read: every pixel, and the labels in the .json."""
    for image in images_of(sample):
        try:
            examine(image)
        except ValueError as error:
            yield f"has an image that cannot be decoded: {error}"
    if "json" in sample:
        try:
            meta = json.loads(sample["json"])
            labels = (meta["id"], meta["class"])
        except (ValueError, KeyError, TypeError) as error:
            yield f"has a .json that cannot be used: {error}"
            return
        if labels != (sample_id, class_id):
            yield f"has id and class {labels} in its .json but the manifest says {(sample_id, class_id)}"
