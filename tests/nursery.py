"""Programs that start at once: forked from a process that has imported torch and the package already.

Importing them takes about four seconds of a core, for each rank of each run, which is longer than most runs of the
tests. Here multiprocessing's fork server imports them once a session, and every program is a fork of it: with its own
arguments, environment, folder and output, and as ``__main__``.

What differs from a process of its own: modules that look at the environment when they are imported have looked before,
and all programs of a session order their sets alike (one hash seed). So the tests of the launchers, of signals during
the start and of many kills (``tests.chaos``) start real processes.
"""

import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
import types
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]
FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload([
    "mlflow.store.tracking.sqlalchemy_store", "mlflow.pyfunc", "sklearn.manifold", "matplotlib.figure", "faiss",
    "deepspeed.runtime.zero.muon.muon_optimizer", "torch.distributed.fsdp", "dist_obdsd.cli.evaluate",
    "dist_obdsd.data.packing.pack", "dist_obdsd.training.trainer",
])  # fmt: skip


class Program:
    """A running program, with the part of ``subprocess.Popen`` that the tests use."""

    def __init__(
        self, arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str], stdout: IO[Any], stderr: IO[Any],
        code: str | None = None,
    ) -> None:  # fmt: skip
        """Start ``python -m dist_obdsd ARGUMENTS``, or ``python -c CODE ARGUMENTS``, in a session of its own."""
        streams = [Connection(os.dup(stream.fileno())) for stream in (stdout, stderr)]  # as which they can be sent
        self._process = FORK_SERVER.Process(target=_become, args=(arguments, cwd, dict(env), code, *streams))
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, or minus the number of the signal that ended it."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(f"pid {self.pid}", timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def close() -> None:
    """End the programs that still run."""
    for process in multiprocessing.active_children():
        process.kill()


def _become(
    arguments: Sequence[str], cwd: Path, env: dict[str, str], code: str | None, stdout: Connection, stderr: Connection
) -> None:
    """Be the program, in a process of its own."""
    gc.freeze()  # no collection looks at what was imported
    os.setsid()
    os.dup2(stdout.fileno(), 1)
    os.dup2(stderr.fileno(), 2)
    os.environ.clear()
    os.environ.update(env)
    time.tzset()
    os.chdir(cwd)
    sys.path.insert(0, "")
    try:
        if code is None:
            sys.argv = ["-m", *arguments]
            runpy.run_module("dist_obdsd", run_name="__main__", alter_sys=True)
        else:
            sys.argv = ["-c", *arguments]
            sys.modules["__main__"] = main = types.ModuleType("__main__")
            exec(code, vars(main))
    except SystemExit as end:  # of argparse, before anything was begun; here torch would be taken apart for a second
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)
