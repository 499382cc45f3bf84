"""Real process groups for tests: one per world size, kept alive for the whole test session.

Processes that meet take longer than most tests, so they are started once. A test names a module-level function;
every rank imports and calls it, and the results come back in rank order. An exception on a rank comes back as its
traceback, and a rank that does not answer in time fails the test and takes its group down.
"""

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any

from tests.nursery import FORK_SERVER

WORLD_SIZES = (1, 2, 3)
MORE_WORLD_SIZES = (*WORLD_SIZES, 4)
"""For what is claimed of four ranks, too; a fourth group costs time and memory, so few tests use it."""
_groups: dict[int, "Group"] = {}


def run(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 300.0) -> list[Any]:
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
        self.folder = tempfile.TemporaryDirectory(prefix="dist-obdsd-test-")
        self.ranks: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            ours, theirs = multiprocessing.Pipe()
            process = FORK_SERVER.Process(target=serve, args=(theirs, rank, world_size, self.folder.name))
            process.start()
            theirs.close()
            self.ranks.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        task = pickle.dumps((function, args))
        for rank in self.ranks:
            rank.send_bytes(task)
        answers: dict[int, Any] = {}
        failures = []
        while missing := [rank for number, rank in enumerate(self.ranks) if number not in answers]:
            ready = connection.wait(missing, timeout)
            if not ready:
                numbers = sorted(set(range(len(self.ranks))) - answers.keys())
                failures.append(f"ranks {numbers} did not answer within {timeout:.0f} s")
                break
            for rank in ready:
                number = self.ranks.index(rank)
                try:
                    failed, answers[number] = pickle.loads(rank.recv_bytes())
                except EOFError:
                    self.processes[number].join()
                    failed, answers[number] = True, f"ended with {self.processes[number].exitcode}"
                if failed:
                    failures.append(f"rank {number}:\n{answers[number]}")
                    timeout = 30.0  # the others are likely waiting for this one in a collective
        if failures:
            raise AssertionError("\n".join(failures))
        return [answers[rank] for rank in range(len(self.ranks))]

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()
        for process in self.processes:
            process.join(timeout=2)
            process.kill()
            process.join()
        self.folder.cleanup()


def serve(tasks: Connection, rank: int, world_size: int, folder: str) -> None:
    """A rank's process: do what comes, and answer, until nothing more can come."""
    import torch
    import torch.distributed as dist

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    store, patience = f"file://{folder}/store", timedelta(seconds=300)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=patience)
    while True:
        try:
            function, args = pickle.loads(tasks.recv_bytes())
        except EOFError:
            break
        try:
            answer = (False, function(*args))
        except Exception:
            answer = (True, traceback.format_exc())
        tasks.send_bytes(pickle.dumps(answer))
    dist.destroy_process_group()
    os._exit(0)  # the interpreter's own end would take a second
