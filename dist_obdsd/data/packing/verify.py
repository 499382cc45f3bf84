"""Check shards against their manifest, to the last pixel."""

import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

from dist_obdsd import console as progress
from dist_obdsd.data import manifest as manifests
from dist_obdsd.data.images import MEMBERS, examine
from dist_obdsd.data.manifest import Shard, key
from dist_obdsd.data.packing.parallel import in_order, processes
from dist_obdsd.data.remote import is_remote
from dist_obdsd.data.shard_reader import open_shard, said, samples_of
from dist_obdsd.errors import RunError


@dataclass
class VerifyReport:
    shards: int = 0
    """Listed in the manifest."""
    images: int = 0
    """Listed in the manifest."""
    bytes: int = 0
    """Of all shards, by the manifest."""
    classes: dict[str, int] = field(default_factory=dict)
    """Split -> classes, by the manifest."""
    problems: list[str] = field(default_factory=list)
    """One sentence each, beginning with the shard's name; empty where all is well."""


def verify(root: str | Path, workers: int = 1, report: Callable[[str], None] = lambda message: None) -> VerifyReport:
    """Read every shard: its size and SHA-256, its keys and classes in the manifest's order, and every image.

    Args:
        root: what ``pack`` wrote: a folder, or a URL or ``pipe:`` command. No cache is asked: what it has was checked.
        workers: processes; 0 and 1 both mean none besides the caller's.
        report: called with each problem as it is found.

    Raises:
        InputError: there is no manifest, or it contradicts itself.
        RunError: the manifest cannot be downloaded, or a process was killed.
    """
    root = str(root)
    manifest = manifests.load(root)
    shards = list(manifest.shards())
    result = VerifyReport(
        shards=len(shards),
        images=sum(len(shard) for shard in shards),
        bytes=sum(shard.bytes for shard in shards),
        classes={split: len(manifest.class_ids(split)) for split in manifest.splits},
    )

    def note(problem: str) -> None:
        report(problem)
        result.problems.append(problem)

    with processes(workers) as pool, progress.bar(result.images, "images", "verifying") as bar:
        checked = in_order(pool, partial(_check_shard, root), shards, 2 * workers)
        for shard, problems in zip(shards, checked, strict=True):
            for problem in problems:
                note(f"{shard.file}: {problem}")
            bar.update(len(shard))
    if not is_remote(root):
        listed = {shard.file for shard in shards}
        present = sorted(str(path.relative_to(root)) for path in Path(root).rglob("*.tar"))
        for name in present:
            if name not in listed:
                note(f"{name}: is not in the manifest; remove it or pack again")
    return result


def _check_shard(root: str, shard: Shard) -> list[str]:
    if not is_remote(root) and not (Path(root) / shard.file).is_file():
        return ["is missing"]
    try:
        with open_shard(root, shard) as file:
            return [*_check_bytes(file, shard), *_check_samples(file, shard)]
    except RunError as error:
        return [str(error)]  # of a download, which was checked on the way
    except OSError as error:
        return [f"cannot be read: {error.strerror or error}"]


def _check_bytes(file: IO[bytes], shard: Shard) -> Iterator[str]:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if size != shard.bytes:
        yield f"has {size} bytes but the manifest says {shard.bytes}"
        return
    digest = hashlib.sha256()
    while data := file.read(2**20):
        digest.update(data)
    file.seek(0)
    if digest.hexdigest() != shard.sha256:
        yield f"has SHA-256 {digest.hexdigest()[:12]}... but the manifest says {shard.sha256[:12]}..."


def _check_samples(file: IO[bytes], shard: Shard) -> Iterator[str]:
    done = 0
    try:
        for sample in samples_of(file, shard.file):
            if done == len(shard):
                yield f"key {sample['__key__']} stands after the manifest's last sample"
                return
            wanted = key(shard.ids[done])
            if sample["__key__"] != wanted:
                # After the first sample out of order every other one would be reported, too.
                yield f"key {sample['__key__']} stands at sample {done} where the manifest has key {wanted}"
                return
            for problem in _check_sample(sample, shard.ids[done], shard.classes[done]):
                yield f"key {wanted} {problem}"
            done += 1
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        place = f"at sample {done}, key {key(shard.ids[done])}" if done < len(shard) else "after its last sample"
        yield f"is broken {place}: {said(error)}"
        return
    if done < len(shard):
        yield f"the tar ends at sample {done} where the manifest has key {key(shard.ids[done])}"


def _check_sample(parts: dict[str, Any], sample_id: int, class_id: int) -> Iterator[str]:
    images = sorted(parts.keys() & set(MEMBERS))
    if len(images) != 1:
        found = ", ".join(sorted(name for name in parts if not name.startswith("__")))
        yield f"has {len(images)} images ({found}) but needs exactly one"
    for suffix in images:
        try:
            examine(parts[suffix])
        except ValueError as error:
            yield f"has an image that cannot be decoded: {error}"
    if "cls" not in parts:
        yield "has no .cls"
    elif parts["cls"].strip() != str(class_id).encode():
        yield f"has class {parts['cls'][:20]!r} but the manifest says {class_id}"
    if "json" in parts:
        try:
            about = json.loads(parts["json"])
            labels = (about["id"], about["class"])
        except (ValueError, KeyError, TypeError) as error:
            yield f"has a .json that cannot be used: {error}"
            return
        if labels != (sample_id, class_id):
            yield f"has id and class {labels} in its .json but the manifest says {(sample_id, class_id)}"
