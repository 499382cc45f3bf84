"""Reading shards: one tar, checked against the manifest, or a rank's windows of shards ahead of the steps.

From a shard only images, integers and JSON are parsed; nothing in it can execute.
"""

import math
import threading
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import IO, Any

from webdataset.tariterators import group_by_keys, tar_file_expander

from dist_obdsd.config import DataConfig
from dist_obdsd.data.cache import Cache
from dist_obdsd.data.images import MEMBERS
from dist_obdsd.data.manifest import Shard, key
from dist_obdsd.data.remote import fetch, is_remote, location, shown
from dist_obdsd.errors import InputError, RunError, UserError

HELD_WINDOWS = 2  # of a lane, as encoded bytes
IN_MEMORY = 2**28  # bytes of a downloaded shard that no cache keeps, beyond which it waits in a temporary file
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd


def check_files(root: str, shards: tuple[Shard, ...]) -> None:
    missing = [] if is_remote(root) else [s.file for s in shards if not (Path(root) / s.file).is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(shards)} shards are missing in {root}, the first is {missing[0]}; copy them there "
            f"or pack the data again"
        )


def cache_of(data: DataConfig) -> Cache | None:
    """The cache that a configuration asks for.

    Raises:
        InputError: its folder cannot be used.
    """
    if data.cache is None or not is_remote(data.shards):
        return None
    return Cache(Path(data.cache), None if data.cache_gib is None else int(data.cache_gib * 2**30))


@contextmanager
def open_shard(root: str, shard: Shard, cache: Cache | None = None) -> Iterator[IO[bytes]]:
    """A shard's tar as a file. One that is not here is downloaded whole and checked before anything is read from it.

    Raises:
        OSError: a local file cannot be opened.
        RunError: it cannot be downloaded, or is not the manifest's.
    """
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


def samples_of(file: IO[bytes], name: str) -> Iterator[dict[str, Any]]:
    """The samples of a plain tar as webdataset groups them: ``__key__``, and suffix -> bytes.

    Raises:
        ValueError: the tar is compressed, or holds a member twice.
        tarfile.TarError, OSError: it is broken.
    """
    begin = file.read(6)
    file.seek(0)
    if begin.startswith(COMPRESSED):
        raise ValueError("it is compressed, and shards are plain tars")
    return group_by_keys(tar_file_expander([{"url": name, "stream": file}]))


def said(error: BaseException) -> str:
    """The cause alone: webdataset adds the names of its objects to an error."""
    text = getattr(error, "strerror", None) or (str(error.args[0]) if error.args else type(error).__name__)
    return " ".join(text.split(" @ ")[0].split())


def read_shard(
    root: str, shard: Shard, wanted: Container[int], cache: Cache | None = None
) -> Iterator[tuple[int, bytes]]:
    """Read one tar from begin to end and give the (id, encoded image) of the wanted samples.

    Raises:
        RunError: the tar is not what the manifest says, naming the shard and the sample.
    """
    url = shown(location(root, shard.file))
    advice = f"check the data with `dist-obdsd verify {shown(root)}`"
    done = 0
    try:
        with open_shard(root, shard, cache) as file:
            for sample in samples_of(file, url):
                if done == len(shard):
                    raise RunError(
                        f"shard {url} goes on with {sample['__key__']} after the {done} samples that the manifest "
                        f"lists; {advice}"
                    )
                image = _image_of(sample, shard, done, url, advice)
                done += 1
                if shard.ids[done - 1] in wanted:
                    yield shard.ids[done - 1], image
    except UserError:
        raise
    except Exception as error:  # tarfile, the file system and the network each have their own
        where = f"at sample {key(shard.ids[done])}" if done < len(shard) else "after its last sample"
        raise RunError(f"shard {url} cannot be read {where} ({said(error)}); {advice}") from error
    if done < len(shard):
        raise RunError(
            f"shard {url} ends before sample {key(shard.ids[done])}, with {done} of {len(shard)} samples; {advice}"
        )


def _image_of(sample: dict[str, Any], shard: Shard, place: int, url: str, advice: str) -> bytes:
    """The encoded image of the sample at a place of a shard, if the sample is the one that the manifest has there."""
    name, label = key(shard.ids[place]), shard.classes[place]
    if sample["__key__"] != name:
        raise RunError(f"shard {url} holds {sample['__key__']} where the manifest has {name}; {advice}")
    image = next((sample[member] for member in MEMBERS if member in sample), None)
    if image is None:
        raise RunError(f"sample {name} of shard {url} has no image (.{', .'.join(MEMBERS)}); {advice}")
    if "cls" not in sample:
        raise RunError(f"sample {name} of shard {url} has no class file (.cls); {advice}")
    if sample["cls"].strip() != str(label).encode():
        raise RunError(
            f"sample {name} of shard {url} has class {sample['cls'][:20]!r} where the manifest has {label}; {advice}"
        )
    return image


class ClosedError(Exception):
    """The stream was closed while a thread waited."""


@dataclass(frozen=True)
class Window:
    """Shards of one lane to read before step ``opens``, and to forget after step ``closes``."""

    epoch: int
    opens: int
    closes: int
    lane: int
    shards: tuple[Shard, ...]
    uses: Mapping[int, int]
    """Image id -> in how many rows of the lane's coming steps it stands; others are not kept."""


class WindowReader:
    """Reads windows in the order of their need, ahead while a lane holds fewer than HELD_WINDOWS."""

    def __init__(self, root: str, windows: Iterator[Window], cache: Cache | None = None) -> None:
        self._root, self._windows, self._cache = root, windows, cache
        self._changed = threading.Condition()
        self._images: dict[tuple[int, int], tuple[bytes, int]] = {}  # (epoch, id) -> encoded, rows to come
        self._held: list[Window] = []
        self._next: tuple[float, float] = (-1, -1)  # (epoch, opens) of the first window that is not read yet
        self._needed: tuple[int, int] = (-1, -1)
        self._failure: BaseException | None = None
        threading.Thread(target=self._run, name="reading", daemon=True).start()

    def take(self, epoch: int, step: int, ids: list[int]) -> list[bytes]:
        """Wait for the encoded images of a step, and let go of them and of the windows that end with it."""
        with self._changed:
            self._needed = (epoch, step)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._failure or self._next > (epoch, step))
            if self._failure:
                raise self._failure
            images = [self._use(epoch, i) for i in ids]
            self._held = [w for w in self._held if (w.epoch, w.closes) > (epoch, step)]
            self._changed.notify_all()
            return images

    def _use(self, epoch: int, sample_id: int) -> bytes:
        image, uses = self._images.pop((epoch, sample_id))
        if uses > 1:
            self._images[epoch, sample_id] = image, uses - 1
        return image

    def close(self) -> None:
        with self._changed:
            self._failure = self._failure or ClosedError()
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            for window in self._windows:
                self._wait_for_room(window)
                images = {}
                for shard in window.shards:
                    for sample_id, image in read_shard(self._root, shard, window.uses, self._cache):
                        images[window.epoch, sample_id] = image, window.uses[sample_id]
                    if self._failure:
                        return
                with self._changed:
                    self._images.update(images)
                    self._held.append(window)
            with self._changed:
                self._next = (math.inf, math.inf)
                self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._failure = self._failure or error
                self._changed.notify_all()

    def _wait_for_room(self, window: Window) -> None:
        with self._changed:
            self._next = (window.epoch, window.opens)
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: (
                    self._failure
                    or sum(held.lane == window.lane for held in self._held) < HELD_WINDOWS
                    or self._needed >= (window.epoch, window.opens)
                )
            )
            if self._failure:
                raise self._failure
