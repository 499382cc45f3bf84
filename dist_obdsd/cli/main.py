"""The command line: dispatch, errors and exit codes.

Exit codes: 0 done, 1 failed while running, 2 bad usage, configuration or input, 75 stopped in good order and ready
to go on (EX_TEMPFAIL of sysexits.h).
"""

import argparse
import atexit
import gc
import importlib
import json
import os
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path

from dist_obdsd import console
from dist_obdsd.cli.parser import parse
from dist_obdsd.cli.ranks import env_rank
from dist_obdsd.errors import InputError, StoppedError, UserError, format_error, is_lost_peer
from dist_obdsd.machine import start_collecting

COMMANDS = {
    "pack": "data", "verify": "data", "train": "train", "status": "run_folder", "stop": "run_folder",
    "compare": "compare", "evaluate": "evaluate", "embed": "evaluate", "search": "search", "serve": "search",
    "export": "export", "figures": "run_folder", "replay": "run_folder", "doctor": "doctor",
}  # fmt: skip
"""Command -> the module of this package with the function of that name, imported when used."""
EXTRAS = {"train": ("matplotlib", "mlflow", "pyarrow", "scipy", "sklearn"), "serve": ("fastapi", "uvicorn")}
"""Extra -> packages that only some commands need."""


def program() -> None:
    """Run, then exit with the code that says how it went.

    The interpreter's own end would take torch's modules apart, which costs a second of each rank and now and then
    aborts in a process group's threads. So what is registered for the end is done, and the rest left to the kernel.
    """
    gc.disable()  # until everything is imported
    code = main(sys.argv[1:])
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # a pipe that nobody reads, or a full disk
        code = code or 1
    os._exit(code)


def main(arguments: list[str]) -> int:
    """Run one command and return its exit code.

    Errors are one line on standard error; a defect of ours comes with its traceback.
    """
    options = parse(arguments)
    try:
        loudness = getattr(options, "quiet", False), getattr(options, "verbose", False)
        with console.log_to_terminal(env_rank() == "0", *loudness):
            code = _run(options)
        sys.stdout.flush()  # here, where a reader that has gone is not an error
        return code
    except UserError as error:
        _record_for_launcher(error)
        # Rank 0 prints an error that every rank has; an error of one rank is printed there.
        if not error.on_all_ranks or env_rank() == "0":
            where = f"{error.where}: " if error.where and not error.on_all_ranks else ""
            print(f"{console.paint('dist-obdsd:', 'red', sys.stderr)} {where}{error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, InputError) else os.EX_TEMPFAIL if isinstance(error, StoppedError) else 1
    except KeyboardInterrupt:
        print("dist-obdsd: interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 1  # whoever read our output, such as head, has enough
    except Exception as error:
        if is_lost_peer(error):
            # The rank that is gone says why; a traceback here would only bury it.
            print(f"rank {env_rank()} stops, since another rank is gone", file=sys.stderr, flush=True)
            return 1
        _record_for_launcher(error)
        traceback.print_exc()
        where = "".join(f"{note}: " for note in getattr(error, "__notes__", [f"rank {env_rank()}"]))
        print(f"dist-obdsd: {where}{format_error(error)}", file=sys.stderr, flush=True)
        return 1


def _run(options: argparse.Namespace) -> int:
    try:
        module = importlib.import_module(f"dist_obdsd.cli.{COMMANDS[options.command]}")
        if options.command != "train":  # which imports most of it later
            start_collecting()
        code: int = getattr(module, options.command)(options)
        return code
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = next((name for name, packages in EXTRAS.items() if package in packages), None)
        if extra is None:
            raise
        raise InputError(
            f"{options.command} needs {package}, which is not installed; pip install 'dist-obdsd[{extra}]'"
        ) from error


def _record_for_launcher(error: Exception) -> None:
    """Give torchrun the error for its summary, which ends with our sentence."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        text = str(error) if isinstance(error, UserError) else traceback.format_exc()
        entry = {"message": {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with suppress(OSError):
            Path(path).write_text(json.dumps(entry))
