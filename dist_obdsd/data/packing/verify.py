"""Checks of shards against their manifest, to the last pixel."""

import hashlib
import logging
import os
from functools import partial
from pathlib import Path

from dist_obdsd import console
from dist_obdsd.data import manifest as manifests
from dist_obdsd.data.images import examine
from dist_obdsd.data.manifest import Shard, key
from dist_obdsd.data.parallel import in_order, processes
from dist_obdsd.data.remote import is_remote
from dist_obdsd.data.shard_reader import (
    ShardError,
    images_of,
    open_shard,
    read_member,
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
    shards = list(manifests.load(root).shards())
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
    problems: list[str] = []
    try:
        with open_shard(root, shard) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            if size != shard.bytes:
                problems.append(f"has {size} bytes but the manifest says {shard.bytes}")
            elif (digest := hashlib.file_digest(file, "sha256").hexdigest()) != shard.sha256:  # type: ignore[arg-type]
                problems.append(f"has SHA-256 {digest[:12]}... but the manifest says {shard.sha256[:12]}...")
            file.seek(0)
            for sample, sample_id, class_id in zip(samples_of(file, shard), shard.ids, shard.classes, strict=True):
                faults = list(sample_faults(file, sample, class_id))
                for place in images_of(sample):
                    try:
                        examine(read_member(file, *place))
                    except ValueError as error:
                        faults.append(f"has an image that cannot be decoded: {error}")
                problems += [f"sample {key(sample_id)} {fault}" for fault in faults]
    except (RunError, ShardError) as error:  # of a download, which was checked on the way; of all samples that follow
        problems.append(str(error))
    except FileNotFoundError:
        problems.append("is missing")
    except OSError as error:
        problems.append(f"cannot be read: {short_reason(error)}")
    return problems
