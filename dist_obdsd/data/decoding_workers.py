"""Decoding processes: encoded bytes in, uint8 images out, in the order that went in.

One thread takes jobs (a batch's encoded rows) from an iterator and cuts each into parts for the processes. They write
pixels into anonymous shared memory that they inherit, so no pixel is copied through a pipe and /dev/shm, which
containers keep small, is not used; what comes back lies there, too, until nobody holds it. Which process decodes a row
never changes the row.
"""

import math
import mmap
import multiprocessing
import os
import queue
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import util
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_obdsd.config import Config
from dist_obdsd.data.decode_tasks import Bad, Left, Part, Row, decode_rows
from dist_obdsd.errors import RunError, UserError
from dist_obdsd.transfer import pin, unpin

SLOTS = 4  # batches that may be read, decoded or ready at a time
LENT = 2  # delivered batches that stay where they were decoded while somebody holds them; further ones are copied


@dataclass(frozen=True)
class Job:
    about: Any
    """Comes back beside the images."""
    rows: list[Row]


@dataclass(frozen=True)
class Decoded:
    about: Any
    images: Tensor
    """uint8 [rows, C, s, s]; rows beyond the job's are zero, those that were left hold anything."""
    bad: list[Bad]
    left: list[Left]
    rows: list[Row]
    """The job's."""


class Decoder:
    """Iterates over ``jobs``, decoded."""

    def __init__(
        self,
        jobs: Iterator[Job],
        rows: int,
        config: Config,
        group: int,
        leave: bool = False,
        pinned: bool = False,
        warn: Callable[[str], None] = print,
    ) -> None:
        """Start ``config.data.workers`` processes and the thread that takes jobs.

        Args:
            jobs: is run in a thread of its own; what it raises reaches the caller of ``__next__``.
            rows: rows of the images that come back; a job has at most as many.
            group: see ``decode_rows``; parts never cut a group.
            leave: see there.
            pinned: let what the processes decode lie in pinned memory, for a GPU to fetch (see ``transfer``).
            warn: is told if it cannot.
        """
        self._jobs, self._config, self._group, self._leave = jobs, config, group, leave
        self._shape = (rows, config.data.channels, config.data.image_size, config.data.image_size)
        # A slot may come back while the garbage collector runs in a thread that is inside of this very queue.
        self._free: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._ready: queue.Queue[Any] = queue.Queue()
        self._lent: set[int] = set()
        for slot in range(SLOTS):
            self._free.put(slot)
        self._closed = False
        self._processes: list[Any] = []
        self._idle: queue.Queue[tuple[Any, Connection]] = queue.Queue()
        self._executor: ThreadPoolExecutor | None = None
        if config.data.workers:
            # Processes before threads: a fork copies locks in whatever state other threads have them.
            self._start_processes()
            self._executor = ThreadPoolExecutor(config.data.workers, "decoding")
            self._pinned = pinned and self._pin_slots(warn)
        self._thread = threading.Thread(target=self._feed, name="feeding", daemon=True)
        self._thread.start()

    def _start_processes(self) -> None:
        for slot in range(SLOTS, SLOTS + LENT):
            self._free.put(slot)
        shape = (SLOTS + LENT, *self._shape)
        self._slots = np.frombuffer(mmap.mmap(-1, math.prod(shape)), dtype=np.uint8).reshape(shape)
        context = multiprocessing.get_context("fork")
        connections: list[Connection] = []
        for _ in range(self._config.data.workers):
            ours, theirs = context.Pipe()
            connections.append(ours)
            process = context.Process(
                target=_work,
                args=(theirs, list(connections), os.getpid(), self._slots, self._config, self._group, self._leave),
                name="dist-obdsd decoding",
                daemon=True,
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._idle.put((process, ours))
        # The processes ignore SIGTERM, so the interpreter's own clean-up at exit would wait for them for ever.
        self._end = util.Finalize(None, _end_processes, args=(self._processes, connections), exitpriority=20)

    def _pin_slots(self, warn: Callable[[str], None]) -> bool:
        try:
            pin(self._slots)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            warn(f"the images' memory cannot be pinned ({reason}); they are copied once more on their way to the GPU")
            return False
        return True

    def _feed(self) -> None:
        try:
            for job in self._jobs:
                slot = self._free.get()
                if slot is None:
                    return
                self._ready.put((job, slot, self._submit(job, slot)))
            self._ready.put(None)
        except BaseException as error:
            self._ready.put(error)

    def _submit(self, job: Job, slot: int) -> list[Future[Part]]:
        if self._executor is None:
            return []
        n, workers = len(job.rows), self._config.data.workers
        part = -(-n // (workers * self._group)) * self._group
        return [
            self._executor.submit(self._decode_elsewhere, slot, start, job.rows[start : start + part])
            for start in range(0, n, part)
        ]

    def _decode_elsewhere(self, slot: int, start: int, rows: list[Row]) -> Part:
        process, connection = self._idle.get()
        try:
            connection.send((slot, start, rows))
            reply = connection.recv()
        except (EOFError, OSError) as error:
            process.join(1)
            raise RunError(
                f"a decoding process ended with exit code {process.exitcode} before it answered; if memory ran out, "
                f"lower data.workers or data.window"
            ) from error
        finally:
            self._idle.put((process, connection))
        if isinstance(reply, str):
            raise RunError(f"a decoding process failed: {reply}")
        return reply.moved(start)

    def __iter__(self) -> "Decoder":
        return self

    def __next__(self) -> Decoded:
        """The next job's images.

        Raises:
            StopIteration: all jobs are done.
            InputError, RunError: what failed in the reading thread or in a decoding process.
        """
        if self._closed:
            raise RunError("the stream is closed")
        item = self._ready.get()
        if item is None or isinstance(item, BaseException):
            self._ready.put(item)  # whoever asks again gets the same answer
            if item is None:
                raise StopIteration
            raise item if isinstance(item, UserError) else RunError(f"reading failed: {type(item).__name__}: {item}")
        job, slot, parts = item
        if self._executor is None:
            images = torch.zeros(self._shape, dtype=torch.uint8)
            done = [decode_rows(job.rows, images, self._config, self._group, self._leave)]
            self._free.put(slot)
        else:
            done = [part.result() for part in parts]
            images = self._deliver(slot, len(job.rows))
        bad, left = [bad for part in done for bad in part.bad], [left for part in done for left in part.left]
        return Decoded(job.about, images, bad, left, job.rows)

    def _deliver(self, slot: int, n: int) -> Tensor:
        """The images in a slot, whose first n rows were decoded. The slot is free again when nobody holds them."""
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
        """Stop the thread and the processes. The owner of ``jobs`` sees to it that its iterator does not block."""
        while True:
            try:
                self._free.get_nowait()
            except queue.Empty:
                break
        self._free.put(None)
        self._closed = True
        self._thread.join(timeout=5)
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
            self._end()
            if self._pinned:
                unpin(self._slots)
                self._pinned = False


def _take_back(lent: set[int], free: "queue.SimpleQueue[int | None]", slot: int) -> None:
    lent.discard(slot)
    free.put(slot)


def _work(
    connection: Connection,
    inherited: list[Connection],
    parent: int,
    slots: np.ndarray,
    config: Config,
    group: int,
    leave: bool,
) -> None:
    """A decoding process: answer until the parent closes the connection or is gone."""
    # The parent decides when to end: launchers send these signals to every process of the job.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # The parent's ends, inherited by the fork, would keep a dead parent's connections open.
    for other in inherited:
        other.close()
    # libjpeg prints a line, which names no file, for damage that it can pass over. Python's own messages still arrive.
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    images = torch.from_numpy(slots)
    while True:
        try:
            while not connection.poll(5):
                if os.getppid() != parent:
                    return
            slot, start, rows = connection.recv()
        except (EOFError, OSError):
            return
        try:
            reply: Any = decode_rows(rows, images[slot, start:], config, group, leave)
        except Exception as error:
            reply = f"{type(error).__name__}: {error}"
        try:
            connection.send(reply)
        except OSError:
            return


def _end_processes(processes: list[Any], connections: list[Connection]) -> None:
    for connection in connections:
        connection.close()
    for process in processes:
        process.join(1)
        if process.is_alive():
            process.kill()
            process.join()
