"""Real process groups for tests: one per world size, kept alive for the whole test session.

Importing torch takes longer than most tests, so the processes are started once. A test names a module-level function;
every rank imports and calls it, and the results come back in rank order. An exception on a rank comes back as its
traceback, and a rank that does not answer in time fails the test and takes its group down.
"""

import multiprocessing
import os
import queue
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

WORLD_SIZES = (1, 2, 3)
MORE_WORLD_SIZES = (*WORLD_SIZES, 4)
"""For what is claimed of four ranks, too; a fourth group costs time and memory, so few tests use it."""
_groups: dict[int, "Group"] = {}


def run(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call ``function(*args)`` on every rank of a group and return the results in rank order.

    The function must be importable (module level) and its arguments and results picklable. With ``world_size`` 1 the
    single process has a process group, too.
    """
    if world_size not in _groups:
        _groups[world_size] = Group(world_size)
    try:
        return _groups[world_size].run(function, args, timeout)
    except Exception:
        _groups.pop(world_size).close()
        raise


def close() -> None:
    for group in _groups.values():
        group.close()
    _groups.clear()


class Group:
    def __init__(self, world_size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory(prefix="dist-obdsd-test-")
        self.results = context.Queue()
        self.tasks = [context.Queue() for _ in range(world_size)]
        self.processes = [
            context.Process(
                target=_serve,
                args=(rank, world_size, os.path.join(self.folder.name, "store"), self.tasks[rank], self.results),
            )
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        for tasks in self.tasks:
            tasks.put((function, args))
        answers: dict[int, Any] = {}
        failures = []
        while len(answers) < len(self.processes):
            try:
                rank, failed, value = self.results.get(timeout=timeout)
            except queue.Empty:
                missing = sorted(set(range(len(self.processes))) - answers.keys())
                failures.append(f"ranks {missing} did not answer within {timeout:.0f} s")
                break
            answers[rank] = value
            if failed:
                failures.append(f"rank {rank}:\n{value}")
                timeout = 10.0  # the others are likely waiting for this one in a collective
        if failures:
            raise AssertionError("\n".join(failures))
        return [answers[rank] for rank in range(len(self.processes))]

    def close(self) -> None:
        for tasks in self.tasks:
            tasks.put(None)
        for process in self.processes:
            process.join(timeout=2)
            if process.is_alive():
                process.kill()
                process.join()
        self.folder.cleanup()


def _serve(rank: int, world_size: int, store: str, tasks: Any, results: Any) -> None:
    import torch
    import torch.distributed as dist

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    while (task := tasks.get()) is not None:
        function, args = task
        try:
            results.put((rank, False, function(*args)))
        except Exception:
            results.put((rank, True, traceback.format_exc()))
    dist.destroy_process_group()
