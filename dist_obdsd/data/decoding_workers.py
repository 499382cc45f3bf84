"""Decoding processes: encoded bytes in, uint8 images out, in the same order.

One thread takes jobs (the encoded images of a batch) from an iterator and cuts each into parts for the processes. They
write pixels into anonymous shared memory that they inherit: no pixel goes through a pipe, and /dev/shm, which
containers keep small, is not used. A batch stays there until nobody holds it. Which process decodes an image
never changes it.
"""

import logging
import math
import mmap
import multiprocessing
import os
import queue
import signal
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing import util
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dist_obdsd.config import Config
from dist_obdsd.data.images import decode
from dist_obdsd.data.parallel import end_with_parent
from dist_obdsd.data.transforms import eval_transform, train_transform
from dist_obdsd.errors import RunError, UserError
from dist_obdsd.rng import rng
from dist_obdsd.transfer import pin, unpin

logger = logging.getLogger(__name__)

SLOTS = 4  # batches that may be read, decoded or ready at a time
LENT = 2  # delivered batches that stay where they were decoded while somebody holds them; further ones are copied


class DecodeTask(NamedTuple):
    id: int
    data: bytes
    place: tuple[int, int, int] | None
    """(epoch, step, global row), which the augmentation is drawn from; None: as in evaluation."""


class DecodeFailure(NamedTuple):
    row: int
    id: int
    reason: str
    replacement: int | None
    """The image of the same group that stands in its row; None when there is none."""


class DecodeJob(NamedTuple):
    """The images of one batch."""

    meta: Any
    """Comes back beside the pixels."""
    tasks: list[DecodeTask]


class DecodedJob(NamedTuple):
    meta: Any
    images: Tensor
    """uint8 [rows, C, s, s]; rows beyond the job's are zero."""
    failures: list[DecodeFailure]


def decode_tasks(tasks: list[DecodeTask], out: Tensor, config: Config, group: int) -> list[DecodeFailure]:
    """Decode and transform every task into its row of ``out`` [n or more, C, s, s].

    A broken image is replaced by the next good one of its ``group`` consecutive rows (1: never).
    """
    # All generators at once: among the decoding, code and tables that they need would be out of the cache every time.
    generators = [None if task.place is None else rng(config.seed, "augment", *task.place) for task in tasks]
    failures = []
    for i, (task, generator) in enumerate(zip(tasks, generators, strict=True)):
        start, reason, shown = i - i % group, "", None
        for member in (task, *(other for other in tasks[start : start + group] if other.id != task.id)):
            try:
                image = decode(member.data, config.data.channels, config.data.exif)
            except ValueError as error:
                reason = reason or str(error)
                continue
            transform = eval_transform if generator is None else partial(train_transform, generator=generator)
            out[i].copy_(transform(image, config.data))
            shown = member.id
            break
        if shown != task.id:
            failures.append(DecodeFailure(i, task.id, reason, shown))
    return failures


class Decoder(Iterator[DecodedJob]):
    """An iterator over ``jobs``, decoded."""

    def __init__(self, jobs: Iterator[DecodeJob], rows: int, config: Config, group: int, pinned: bool = False) -> None:
        """Start ``config.data.workers`` processes and the thread that takes jobs.

        Args:
            jobs: is run in a thread of its own; what it raises reaches the caller of ``__next__``.
            rows: rows of the images that come back; a job has at most as many.
            group: see ``decode_tasks``; parts never cut a group.
            pinned: let what the processes decode lie in pinned memory, for a GPU to fetch (see ``transfer``).
        """
        self._jobs, self._config, self._group = jobs, config, group
        self._shape = (rows, config.data.channels, *config.data.size)
        # A slot may come back while the garbage collector runs in a thread that is inside of this very queue.
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._ready: queue.Queue[Any] = queue.Queue()
        self._lent: set[int] = set()
        self._closed = False
        shape = (SLOTS + LENT, *self._shape)
        self._slots = np.frombuffer(mmap.mmap(-1, math.prod(shape)), dtype=np.uint8).reshape(shape)
        for slot in range(len(self._slots)):
            self._free.put(slot)
        self._processes: list[Any] = []
        self._idle: queue.Queue[tuple[Any, Connection]] = queue.Queue()
        # Processes before threads: a fork copies locks in whatever state other threads have them.
        for _ in range(config.data.workers):
            self._start_process()
        # The processes ignore SIGTERM, so the interpreter's own clean-up at exit would wait for them for ever.
        self._end = util.Finalize(None, _kill, args=(self._processes,), exitpriority=20)
        self._parts = max(1, config.data.workers)  # of a job
        self._executor = ThreadPoolExecutor(self._parts, "decoding")
        self._pinned = pinned and self._pin_slots()
        self._thread = threading.Thread(target=self._feed, name="feeding", daemon=True)
        self._thread.start()

    def _start_process(self) -> None:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        arguments = (theirs, self._slots, self._config, self._group)
        process = context.Process(target=_work, args=arguments, name="dist-obdsd decoding", daemon=True)
        process.start()
        theirs.close()  # so that the end of the process is the end of its answers
        self._processes.append(process)
        self._idle.put((process, ours))

    def _pin_slots(self) -> bool:
        try:
            pin(self._slots)
        except RuntimeError as error:
            logger.warning(
                "the images' memory cannot be pinned (%s); they are copied once more on their way to the GPU",
                str(error).splitlines()[0],
            )
            return False
        return True

    def _feed(self) -> None:
        try:
            for job in self._jobs:
                slot = self._free.get()
                if self._closed:
                    return
                n = len(job.tasks)
                size = -(-n // (self._parts * self._group)) * self._group
                parts = ((start, job.tasks[start : start + size]) for start in range(0, n, size))
                self._ready.put((job, slot, [self._executor.submit(self._decode, slot, *part) for part in parts]))
            self._ready.put(None)
        except BaseException as error:
            self._ready.put(error)

    def _decode(self, slot: int, start: int, tasks: list[DecodeTask]) -> list[DecodeFailure]:
        """Decode a part of a job, in a process that is idle or, without any, here."""
        if not self._processes:
            return decode_tasks(tasks, torch.from_numpy(self._slots[slot]), self._config, self._group)
        process, connection = self._idle.get()
        try:
            connection.send((slot, start, tasks))
            reply = connection.recv()
        except (EOFError, OSError) as error:
            process.join(1)
            raise RunError(
                f"a decoding process ended with exit code {process.exitcode} before it answered; if memory ran out, "
                f"lower data.workers or data.window"
            ) from error
        finally:
            self._idle.put((process, connection))
        if isinstance(reply, UserError):
            raise reply
        return [failure._replace(row=failure.row + start) for failure in reply]

    def __next__(self) -> DecodedJob:
        """Wait for the next job's images, or raise what failed elsewhere."""
        if self._closed:
            raise RunError("the stream is closed")
        item = self._ready.get()
        if item is None or isinstance(item, BaseException):
            self._ready.put(item)  # whoever asks again gets the same answer
            if item is None:
                raise StopIteration
            raise item if isinstance(item, UserError) else RunError(f"reading failed: {type(item).__name__}: {item}")
        job, slot, parts = item
        failures = [failure for part in parts for failure in part.result()]
        return DecodedJob(job.meta, self._deliver(slot, len(job.tasks)), failures)

    def _deliver(self, slot: int, n: int) -> Tensor:
        """Lend the n images that were decoded in a slot until nobody holds them."""
        array = self._slots[slot]
        array[n:] = 0  # padding, which must not hold what another batch left there
        if len(self._lent) == LENT:
            images = torch.from_numpy(array.copy())
            self._free.put(slot)
            return images
        self._lent.add(slot)
        # The tensor, and whatever is a part of it, holds this array.
        weakref.finalize(array, _take_back, self._lent, self._free, slot).atexit = False
        return torch.from_numpy(array)

    def close(self) -> None:
        """Stop the thread and the processes; the iterator of jobs must not block."""
        self._closed = True
        self._free.put(-1)  # wakes the thread
        self._thread.join(timeout=5)
        self._executor.shutdown(cancel_futures=True)
        self._end()
        if self._pinned:
            unpin(self._slots)
            self._pinned = False


def _take_back(lent: set[int], free: "queue.SimpleQueue[int]", slot: int) -> None:
    lent.discard(slot)
    free.put(slot)


def _work(connection: Connection, slots: np.ndarray, config: Config, group: int) -> None:
    """Run a decoding process until it is killed or its parent is gone."""
    # The parent decides when to end: launchers send these signals to every process of the job.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
    # libjpeg prints a line, which names no file, for damage that it can pass over. Python's own messages still arrive.
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    images = torch.from_numpy(slots)
    with suppress(EOFError, OSError):  # a parent that is gone
        while True:
            slot, start, tasks = connection.recv()
            try:
                reply: Any = decode_tasks(tasks, images[slot, start:], config, group)
            except UserError as error:  # of an augmentation of the user's own
                reply = error
            except Exception as error:
                reply = RunError(f"a decoding process failed: {type(error).__name__}: {error}")
            connection.send(reply)


def _kill(processes: list[Any]) -> None:
    for process in processes:
        process.kill()
        process.join()
