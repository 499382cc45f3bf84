"""Programs that start at once: forked from a process that has imported torch and the package already.

Importing them takes about four seconds of a core, for each rank of each run, which is longer than most runs of the
tests. Here one process per test session, without threads, imports them, and every program is a fork of it: with its own
arguments, environment, folder and output, and as ``__main__``.

What differs from a process of its own: modules that look at the environment when they are imported have looked before,
and all programs of a session order their sets alike (one hash seed). So the tests of the launchers, of signals during
the start and of many kills (``tests.chaos``) start real processes.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]
MESSAGE_BYTES = 1 << 17
"""More than an environment and a command line take, and less than a Unix socket's buffer."""
_server: tuple[subprocess.Popen[bytes], socket.socket] | None = None


class Program:
    """A running program, with the part of ``subprocess.Popen`` that the tests use."""

    def __init__(
        self, arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str], stdout: IO[Any], stderr: IO[Any],
        code: str | None = None, stdin: Any = None,
    ) -> None:  # fmt: skip
        """Start ``python -m dist_obdsd ARGUMENTS``, or ``python -c CODE ARGUMENTS``, in a session of its own.

        Args:
            stdin: anything with a descriptor; by default nothing can be read.
        """
        self.returncode: int | None = None
        told, tell = os.pipe()
        request = {"arguments": list(arguments), "cwd": str(cwd), "env": dict(env), "code": code}
        with open(os.devnull, "rb") as nothing:
            files = [(stdin or nothing).fileno(), stdout.fileno(), stderr.fileno(), tell]
            socket.send_fds(_nursery(), [json.dumps(request).encode()], files)
        os.close(tell)
        self._told = os.fdopen(told, "rb", buffering=0)
        self.pid = int(self._told.readline())

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._told], [], [], 0)[0]:
            self._end()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, or minus the number of the signal that ended it."""
        if self.returncode is None:
            if not select.select([self._told], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"pid {self.pid}", timeout or 0)
            self._end()
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _end(self) -> None:
        answer = self._told.readline()
        assert answer, "the process that starts the tests' programs is gone"
        self.returncode = os.waitstatus_to_exitcode(int(answer))
        self._told.close()


def close() -> None:
    """End the process that starts programs, and those that still run."""
    global _server
    if _server is not None:
        process, control = _server
        control.close()
        process.wait()
        _server = None


def _nursery() -> socket.socket:
    global _server
    if _server is None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.nursery", str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=env,
            )  # fmt: skip
        _server = process, ours
    return _server[1]


def _serve(control: socket.socket) -> dict[str, Any]:
    """Fork a process per request and tell its number and its end. Returns in the forked ones only."""
    running: dict[int, tuple[int, int]] = {}  # descriptor of a process -> its number and where to tell its end
    while True:
        ready = select.select([control, *running], [], [])[0]
        for descriptor in running.keys() & set(ready):
            pid, tell = running.pop(descriptor)
            os.close(descriptor)
            _say(tell, os.waitpid(pid, 0)[1])
            os.close(tell)
        if control not in ready:
            continue
        message, files, _, _ = socket.recv_fds(control, MESSAGE_BYTES, 4)
        if not message:
            for pid, _ in running.values():
                os.kill(pid, signal.SIGKILL)
            os._exit(0)
        *streams, tell = files
        if b"strategy=deepspeed" in message:
            _import("deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer")
        pid = os.fork()
        if pid == 0:
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
            control.detach()
            os.closerange(3, 1024)  # those of this process and of the other programs
            return json.loads(message)
        for stream in streams:
            os.close(stream)
        _say(tell, pid)
        running[os.pidfd_open(pid)] = (pid, tell)


def _say(tell: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody waits for this program any more
        os.write(tell, b"%d\n" % number)


def _import(*names: str) -> None:
    """Import modules, and keep the garbage collections of all programs from looking at them."""
    for name in names:
        importlib.import_module(name)
    gc.freeze()


def _become(request: dict[str, Any]) -> None:
    """Be the program, in a process of its own."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["env"])
    time.tzset()
    os.chdir(request["cwd"])
    sys.path[0] = ""
    try:
        if request["code"] is None:
            sys.argv = ["-m", *request["arguments"]]
            runpy.run_module("dist_obdsd", run_name="__main__", alter_sys=True)
        else:
            sys.argv = ["-c", *request["arguments"]]
            sys.modules["__main__"] = main = types.ModuleType("__main__")
            exec(request["code"], vars(main))
    except SystemExit as end:  # of argparse, before anything was begun; here torch would be taken apart for a second
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever uses this process decides when it ends
    _import(
        "mlflow.store.tracking.sqlalchemy_store", "mlflow.pyfunc", "sklearn.manifold", "matplotlib.figure", "faiss",
        "torch.distributed.fsdp", "dist_obdsd.cli.evaluate", "dist_obdsd.data.packing.pack",
        "dist_obdsd.training.trainer",
    )  # fmt: skip
    threads = {Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")[1:]}
    # The allocator that pyarrow brings along starts a thread which it stops and starts around forks.
    assert threads <= {"jemalloc_bg_thd"}, f"a process with threads cannot be forked soundly: {threads}"
    _become(_serve(socket.socket(fileno=int(sys.argv[1]))))
