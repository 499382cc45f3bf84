"""Work in several processes, with the results in the order of the tasks.

Threads would not help: with small images Pillow holds the interpreter's lock most of the time.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from dist_obdsd.errors import RunError

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def processes(workers: int) -> Iterator[Executor | None]:
    """Start processes that end with this one; None where one would do."""
    if workers <= 1:
        yield None
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start)
    try:
        # All of them now: a fork copies locks in whatever state the threads that come later have them.
        pool.submit(os.getpid).result()
        yield pool
    except BrokenExecutor as error:
        raise RunError("a process that decodes images was killed; if memory ran out, lower --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to everybody; the parent decides
    end_with_parent()


def end_with_parent() -> None:
    """Let this process end when the one that started it is gone, even if killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        while os.getppid() == parent.pid:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def in_order(pool: Executor | None, function: Callable[[T], R], tasks: Iterable[T], ahead: int) -> Iterator[R]:
    """Map in order, with at most ``ahead`` results that were not taken yet."""
    if pool is None:
        yield from map(function, tasks)
        return
    waiting: deque[Future[R]] = deque()
    for task in tasks:
        waiting.append(pool.submit(function, task))
        if len(waiting) == ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
