"""Reading shards: one tar, checked against the manifest, or a rank's windows of shards ahead of the steps.

From a shard only images, integers and JSON are parsed; nothing in it can execute.
"""

import math
import threading
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from webdataset.tariterators import tarfile_samples

from dist_obdsd.data.imagefile import MEMBERS
from dist_obdsd.data.manifest import Shard, is_remote, key, location
from dist_obdsd.errors import InputError, RunError

HELD_WINDOWS = 2  # of a lane, as encoded bytes


def check_files(root: str, shards: tuple[Shard, ...]) -> None:
    missing = [] if is_remote(root) else [s.file for s in shards if not (Path(root) / s.file).is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(shards)} shards are missing in {root}, the first is {missing[0]}; copy them there "
            f"or pack the data again"
        )


def read_shard(root: str, shard: Shard, wanted: Container[int]) -> Iterator[tuple[int, bytes]]:
    """Read one tar from begin to end and give the (id, encoded image) of the wanted samples.

    Raises:
        RunError: the tar is not what the manifest says, naming the shard and the sample.
    """
    url = location(root, shard.file)
    advice = f"check the data with `dist-obdsd verify {root}`"
    done = 0
    try:
        for sample in tarfile_samples([{"url": url}]):
            if done == len(shard):
                raise RunError(
                    f"shard {url} goes on with {sample['__key__']} after the {done} samples that the manifest lists; "
                    f"{advice}"
                )
            sample_id, label = shard.ids[done], shard.classes[done]
            if sample["__key__"] != key(sample_id):
                raise RunError(
                    f"shard {url} holds {sample['__key__']} where the manifest has {key(sample_id)}; {advice}"
                )
            image = next((sample[member] for member in MEMBERS if member in sample), None)
            if image is None:
                raise RunError(
                    f"sample {key(sample_id)} of shard {url} has no image (.{', .'.join(MEMBERS)}); {advice}"
                )
            if "cls" not in sample:
                raise RunError(f"sample {key(sample_id)} of shard {url} has no class file (.cls); {advice}")
            if sample["cls"].strip() != str(label).encode():
                raise RunError(
                    f"sample {key(sample_id)} of shard {url} has class {sample['cls'][:20]!r} where the manifest has "
                    f"{label}; {advice}"
                )
            done += 1
            if sample_id in wanted:
                yield sample_id, image
    except RunError:
        raise
    except Exception as error:  # tarfile, the file system and the network each have their own
        said = getattr(error, "strerror", None) or (str(error.args[0]) if error.args else type(error).__name__)
        where = f"at sample {key(shard.ids[done])}" if done < len(shard) else "after its last sample"
        raise RunError(f"shard {url} cannot be read {where} ({said.split(' @ ')[0]}); {advice}") from error
    if done < len(shard):
        raise RunError(
            f"shard {url} ends before sample {key(shard.ids[done])}, with {done} of {len(shard)} samples; {advice}"
        )


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

    def __init__(self, root: str, windows: Iterator[Window]) -> None:
        self._root, self._windows = root, windows
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
                    for sample_id, image in read_shard(self._root, shard, window.uses):
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
