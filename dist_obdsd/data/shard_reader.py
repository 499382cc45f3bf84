"""Reading of shards: a checked tar, or a rank's windows ahead of the steps.

From a shard only images, integers and JSON are parsed; nothing in it can execute.
"""

import json
import logging
import math
import os
import tarfile
import threading
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import IO

import numpy as np

from dist_obdsd.config.sections import DataConfig
from dist_obdsd.data.cache import Cache
from dist_obdsd.data.images import MEMBERS
from dist_obdsd.data.manifest import Shard, key
from dist_obdsd.data.remote import faults_of, fetch, is_remote, location, shown
from dist_obdsd.errors import InputError, RunError

logger = logging.getLogger(__name__)

HELD_WINDOWS = 2  # of a lane, as encoded bytes
IN_MEMORY = 2**28  # bytes of a downloaded shard that no cache keeps, beyond which it waits in a temporary file

Sample = dict[str, tuple[int, int]]
"""A member's suffix -> its first byte in the tar, and its length."""
Places = dict[tuple[str, int], np.ndarray]
"""A shard's file and size -> first byte and length [n, 2] of its images, in their order."""


class ShardError(Exception):
    """A difference from the manifest, as a clause: ``ends before sample 00000003``."""


def check_files(root: str, shards: tuple[Shard, ...], sizes: bool = False) -> None:
    """Raise InputError where shards are missing.

    Args:
        sizes: compare the files' sizes with the manifest, too, and ask the server of remote ones, which else pass.
    """
    if is_remote(root) and not sizes:
        return
    if root.startswith("pipe:"):  # a command cannot be asked, so only the first file is begun
        shards = shards[:1]
    wanted = [shard.bytes if sizes else None for shard in shards]
    found = faults_of([location(root, shard.file) for shard in shards], wanted)
    if faults := [f"{shard.file} ({fault})" for shard, fault in zip(shards, found, strict=True) if fault]:
        raise InputError(
            f"{len(faults)} of {len(shards)} shards are missing or damaged at {shown(root)}, the first is {faults[0]}; "
            f"copy them there again, or check the address and your access"
        )
    if unknown := found.count(None):
        logger.info("%d of %d shards could not be checked before they are read", unknown, len(shards))


def cache_of(data: DataConfig) -> Cache | None:
    """Open the cache that a configuration asks for."""
    if data.cache is None or not is_remote(data.shards):
        return None
    return Cache(Path(data.cache), None if data.cache_gib is None else int(data.cache_gib * 2**30))


@contextmanager
def open_shard(root: str, shard: Shard, cache: Cache | None = None) -> Iterator[IO[bytes]]:
    """Open a shard's tar; a remote one is downloaded and checked first."""
    url = location(root, shard.file)
    if not is_remote(root):
        with open(url, "rb") as local:
            yield local
    elif cache is not None:
        with cache.open(shard, url) as cached:
            yield cached
    else:
        with SpooledTemporaryFile(IN_MEMORY) as copy:
            fetch(url, copy, shard.bytes, shard.sha256)
            copy.seek(0)
            yield copy


def samples_of(file: IO[bytes], shard: Shard) -> Iterator[Sample]:
    """Find a tar's samples, by webdataset's naming rule.

    Raises:
        ShardError: the tar is broken, or its keys are not the manifest's, in their order.
    """
    done = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            files = ((member.name.partition("."), member) for member in tar if member.isfile() and "." in member.name)
            for name, group in groupby(files, lambda found: found[0][0]):
                if done == len(shard):
                    raise ShardError(f"goes on with {name} after the {done} samples that the manifest lists")
                if name != key(shard.ids[done]):
                    raise ShardError(f"holds {name} where the manifest has {key(shard.ids[done])}")
                sample: Sample = {}
                for (_, _, suffix), member in group:
                    if suffix.lower() in sample:
                        raise ValueError(f"it has two files {member.name}")
                    sample[suffix.lower()] = member.offset_data, member.size
                done += 1
                yield sample
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        where = f"at sample {key(shard.ids[done])}" if done < len(shard) else "after its last sample"
        raise ShardError(f"cannot be read {where} ({short_reason(error)})") from error
    if done < len(shard):
        raise ShardError(f"ends before sample {key(shard.ids[done])}, with {done} of {len(shard)} samples")


def read_member(file: IO[bytes], start: int, size: int) -> bytes:
    file.seek(start)
    data = file.read(size)
    if len(data) < size:
        raise ShardError(f"ends after {start + len(data)} bytes, within a file of {size}")
    return data


def sample_faults(file: IO[bytes], sample: Sample, class_id: int) -> Iterator[str]:
    """Name the faults of a sample's members, a clause each, without decoding."""
    images = len(images_of(sample))
    if images != 1:
        yield f"has {images or 'no'} image{'s' * (images > 1)} (.{', .'.join(MEMBERS)}) but needs exactly one"
    if "cls" not in sample:
        yield "has no class file (.cls)"
    elif (label := read_member(file, *sample["cls"])).strip() != str(class_id).encode():
        yield f"has class {label[:20]!r} where the manifest has {class_id}"


def images_of(sample: Sample) -> list[tuple[int, int]]:
    """List the places of a sample's images; one that is sound has exactly one."""
    return [sample[member] for member in MEMBERS if member in sample]


def short_reason(error: BaseException) -> str:
    """Return the cause alone, in one line."""
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())


def read_shard(
    root: str, shard: Shard, wanted: Container[int], cache: Cache | None = None, places: Places | None = None
) -> Iterator[tuple[int, bytes]]:
    """Read (id, encoded image) of the wanted samples, in the tar's order.

    Args:
        places: is filled with those of all images. In a shard that it holds, only the wanted images are read.

    Raises:
        RunError: the tar is not what the manifest says, naming the shard and the sample.
    """
    places = {} if places is None else places
    with _explained(root, shard, cache), open_shard(root, shard, cache) as file:
        name = shard.file, file.seek(0, os.SEEK_END)
        file.seek(0)
        if name in places:
            for sample_id, place in zip(shard.ids, places[name].tolist(), strict=True):
                if sample_id in wanted:
                    yield sample_id, read_member(file, *place)
            return
        found: list[tuple[int, int]] = []
        for sample, sample_id, class_id in zip(samples_of(file, shard), shard.ids, shard.classes, strict=True):
            for fault in sample_faults(file, sample, class_id):
                raise ShardError(f"holds sample {key(sample_id)}, which {fault}")
            found += images_of(sample)
            if sample_id in wanted:
                yield sample_id, read_member(file, *found[-1])
        places[name] = np.array(found, dtype=np.int64)


@contextmanager
def _explained(root: str, shard: Shard, cache: Cache | None) -> Iterator[None]:
    """Turn what is wrong with a shard into a RunError that says what to do."""
    try:
        yield
    except (ShardError, ValueError, OSError) as error:
        reason = f"cannot be opened ({short_reason(error)})" if isinstance(error, OSError) else error
        again = "" if cache is None else f"remove its copy {cache.path(shard)}, or "
        advice = f"{again}check the data with `dist-obdsd verify {shown(root)}`"
        raise RunError(f"shard {shown(location(root, shard.file))} {reason}; {advice}") from error


def image_names(
    root: str, shards: Iterable[Shard], ids: Container[int] | None = None, cache: Cache | None = None
) -> dict[int, str]:
    """Look up the original paths of packed images: id -> path with forward slashes.

    Of a local shard only the headers and the small .json members are read; a remote one is downloaded.

    Args:
        ids: the images to name; None: all. One is left out where its shard, of another maker, holds no name.

    Raises:
        RunError: a shard cannot be read.
    """
    names: dict[int, str] = {}
    for shard in shards:
        wanted = {i for i in shard.ids if ids is None or i in ids}
        if not wanted:
            continue
        with _explained(root, shard, cache), open_shard(root, shard, cache) as file:
            for sample, sample_id in zip(samples_of(file, shard), shard.ids, strict=True):
                named = sample_id in wanted and "json" in sample
                meta = json.loads(read_member(file, *sample["json"])) if named else None
                if isinstance(meta, dict) and isinstance(name := meta.get("name"), str):
                    names[sample_id] = name
    return names


@dataclass(frozen=True)
class Window:
    """Shards of a lane to read before step ``opens`` and forget after step ``closes``."""

    epoch: int
    opens: int
    closes: int
    lane: int
    shards: tuple[Shard, ...]
    uses: Mapping[int, int]
    """Image id -> in how many rows of the lane's coming steps it stands; others are not kept."""


class WindowReader:
    """A reader of windows in the order of need, HELD_WINDOWS a lane ahead."""

    def __init__(self, root: str, windows: Iterator[Window], cache: Cache | None = None) -> None:
        self._root, self._windows, self._cache = root, windows, cache
        self._places: Places = {}  # so that an image of released sampling is found without reading the others again
        self._changed = threading.Condition()
        self._images: dict[tuple[int, int], tuple[bytes, int]] = {}  # (epoch, id) -> encoded, rows to come
        self._held: list[Window] = []
        self._next: tuple[float, float] = (-1, -1)  # (epoch, opens) of the first window that is not read yet
        self._needed: tuple[int, int] = (-1, -1)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="reading", daemon=True)

    def take(self, epoch: int, step: int, ids: list[int]) -> list[bytes]:
        """Wait for a step's encoded images; let go of them and of windows that end."""
        with self._changed:
            if self._thread.ident is None:
                self._thread.start()
            self._needed = (epoch, step)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._failure or self._next > (epoch, step))
            if self._failure:
                raise self._failure
            images = []
            for i in ids:
                image, uses = self._images.pop((epoch, i))
                images.append(image)
                if uses > 1:
                    self._images[epoch, i] = image, uses - 1
            self._held = [w for w in self._held if (w.epoch, w.closes) > (epoch, step)]
            self._changed.notify_all()
            return images

    def close(self, error: BaseException | None = None) -> None:
        """Stop reading; whoever waits for images gets the error."""
        with self._changed:
            self._failure = self._failure or error or RunError("the stream is closed")
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            for window in self._windows:
                self._wait_for_room(window)
                images: dict[int, bytes] = {}
                for shard in window.shards:
                    images |= read_shard(self._root, shard, window.uses, self._cache, self._places)
                    if self._failure:
                        return
                with self._changed:
                    for sample_id, image in images.items():
                        # With released sampling the window before may still hold the same image.
                        before = self._images.get((window.epoch, sample_id), (image, 0))[1]
                        self._images[window.epoch, sample_id] = image, before + window.uses[sample_id]
                    self._held.append(window)
            with self._changed:
                self._next = (math.inf, math.inf)
                self._changed.notify_all()
        except BaseException as error:
            self.close(error)

    def _wait_for_room(self, window: Window) -> None:
        def room() -> bool:
            held = sum(held.lane == window.lane for held in self._held)
            return held < HELD_WINDOWS or self._needed >= self._next

        with self._changed:
            self._next = (window.epoch, window.opens)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._failure or room())
            if self._failure:
                raise self._failure
