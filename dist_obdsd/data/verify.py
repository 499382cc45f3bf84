"""Check a folder of shards against its manifest, to the last pixel."""

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from dist_obdsd.data import manifest as manifests
from dist_obdsd.data.imagefile import MEMBERS, examine
from dist_obdsd.data.manifest import Shard


@dataclass
class VerifyReport:
    shards: int = 0
    """Listed in the manifest."""
    images: int = 0
    """Listed in the manifest."""
    classes: dict[str, int] = field(default_factory=dict)
    """Split -> classes, by the manifest."""
    problems: list[str] = field(default_factory=list)
    """One sentence each, beginning with the shard's name; empty where all is well."""


def verify(folder: Path, workers: int = 1, report: Callable[[str], None] = lambda message: None) -> VerifyReport:
    """Read every shard: its size and SHA-256, its keys and classes in the manifest's order, and every image.

    Args:
        folder: what ``pack`` wrote.
        workers: threads; 0 and 1 both mean none besides the caller's.
        report: called with each problem as it is found.

    Raises:
        InputError: there is no manifest, or it contradicts itself.
    """
    manifest = manifests.load(folder)
    shards = list(manifest.shards())
    result = VerifyReport(
        shards=len(shards),
        images=sum(len(shard) for shard in shards),
        classes={split: len(manifest.class_ids(split)) for split in manifest.splits},
    )
    check = partial(_check_shard, Path(folder))
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for problems in pool.map(check, shards) if workers > 1 else map(check, shards):
            for problem in problems:
                report(problem)
                result.problems.append(problem)
    listed = {shard.file for shard in shards}
    present = sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*.tar"))
    for name in present:
        if name not in listed:
            result.problems.append(f"{name}: is not in the manifest; remove it or pack again")
            report(result.problems[-1])
    return result


def _check_shard(folder: Path, shard: Shard) -> list[str]:
    path = folder / shard.file
    if not path.is_file():
        return [f"{shard.file}: is missing"]
    try:
        return [f"{shard.file}: {problem}" for problem in (*_check_bytes(path, shard), *_check_samples(path, shard))]
    except OSError as error:
        return [f"{shard.file}: cannot be read: {error.strerror or error}"]


def _check_bytes(path: Path, shard: Shard) -> Iterator[str]:
    size = path.stat().st_size
    if size != shard.bytes:
        yield f"has {size} bytes but the manifest says {shard.bytes}"
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != shard.sha256:
        yield f"has SHA-256 {found[:12]}... but the manifest says {shard.sha256[:12]}..."


def _check_samples(path: Path, shard: Shard) -> Iterator[str]:
    samples = _read_samples(path)
    for position, (sample_id, class_id) in enumerate(zip(shard.ids, shard.classes, strict=True)):
        wanted = manifests.key(sample_id)
        try:
            key, parts = next(samples, (None, {}))
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            yield f"is broken at sample {position}, key {wanted}: {error}"
            return
        if key != wanted:
            # After the first sample out of order every other one would be reported, too.
            found = "the tar ends" if key is None else f"key {key} stands"
            yield f"{found} at sample {position} where the manifest has key {wanted}"
            return
        for problem in _check_sample(parts, sample_id, class_id):
            yield f"key {wanted} {problem}"
    try:
        extra, _ = next(samples, (None, {}))
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        yield f"is broken after its last sample: {error}"
        return
    if extra is not None:
        yield f"key {extra} stands after the manifest's last sample"


def _read_samples(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of a tar: members that follow each other and share the name up to the first dot."""
    current: str | None = None
    parts: dict[str, bytes] = {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isreg() else None
            if file is None:
                continue
            key, _, suffix = member.name.partition(".")
            if key != current:
                if current is not None:
                    yield current, parts
                current, parts = key, {}
            if suffix in parts:
                raise ValueError(f"{member.name} stands twice")
            parts[suffix.lower()] = file.read()
    if current is not None:
        yield current, parts


def _check_sample(parts: dict[str, bytes], sample_id: int, class_id: int) -> Iterator[str]:
    images = sorted(parts.keys() & set(MEMBERS))
    if len(images) != 1:
        yield f"has {len(images)} images ({', '.join(sorted(parts))}) but needs exactly one"
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
            found = (about["id"], about["class"])
        except (ValueError, KeyError, TypeError) as error:
            yield f"has a .json that cannot be used: {error}"
            return
        if found != (sample_id, class_id):
            yield f"has id and class {found} in its .json but the manifest says {(sample_id, class_id)}"
