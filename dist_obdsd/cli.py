"""The command line. Imports are lazy, so that ``--help`` answers at once.

Exit codes: 0 done, 1 failed while running, 2 bad usage, configuration or input.
"""

import argparse
import atexit
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_obdsd import progress
from dist_obdsd.arguments import parse
from dist_obdsd.errors import InputError, UserError, sentence

if TYPE_CHECKING:
    from dist_obdsd.config import Config
    from dist_obdsd.runtime import Runtime
    from dist_obdsd.training.stopping import StopSignals

# What only some commands need, by the name of its module; training and measuring do without.
OPTIONAL = {
    "matplotlib": "matplotlib",
    "mlflow": "mlflow",
    "pyarrow": "pyarrow",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
}
LOST_PEER = ("Connection closed by peer", "Connection reset by peer")  # what gloo says of a rank that ended


def program() -> None:
    """Entry point: run, then exit with the code that says how it went.

    The interpreter's own end would take torch's modules apart, which costs more than a second of each rank, and now and
    then aborts a process when it comes to the native threads of process groups. So all that is registered for the end
    is done, threads included, and the rest is left to the kernel.
    """
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
    """Run one command.

    Returns:
        0, 1 or 2. Errors are one line on standard error; a defect of ours comes with its traceback.
    """
    options = parse(arguments)
    try:
        code = _run(options)
        sys.stdout.flush()  # here, where a reader that has gone is not an error
        return code
    except UserError as error:
        _tell_launcher(error)
        # What every rank found alike is said once; what one rank found, only that rank can say.
        if not error.everywhere or _rank() == "0":
            where = f"{error.where}: " if error.where and not error.everywhere else ""
            print(f"{progress.paint('dist-obdsd:', 'red', sys.stderr)} {where}{error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        print("dist-obdsd: interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 1  # whoever read our output, such as head, has enough
    except Exception as error:
        if any(mark in str(error) for mark in LOST_PEER):
            # The rank that is gone says why; a traceback here would only bury it.
            print(f"rank {_rank()} stops, since another rank is gone", file=sys.stderr, flush=True)
            return 1
        _tell_launcher(error)
        traceback.print_exc()
        where = "".join(f"{note}: " for note in getattr(error, "__notes__", [f"rank {_rank()}"]))
        print(f"dist-obdsd: {where}{sentence(error)}", file=sys.stderr, flush=True)
        return 1


def _run(options: argparse.Namespace) -> int:
    try:
        return COMMANDS[options.command](options)
    except ModuleNotFoundError as error:
        package = OPTIONAL.get((error.name or "").partition(".")[0])
        if package is None:
            raise
        raise InputError(
            f"{options.command} needs {package} for this, which is not installed; pip install {package}"
        ) from error


def _rank() -> str:
    return os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"


def _tell_launcher(error: Exception) -> None:
    """Let torchrun's summary carry our sentence."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        handler = get_error_handler()
        handler.initialize()
        handler.record_exception(error)


def _pack(options: argparse.Namespace) -> int:
    from dist_obdsd.data.mixing import describe
    from dist_obdsd.data.pack import pack
    from dist_obdsd.data.recipes import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    start = time.monotonic()
    manifest = pack(
        recipe,
        options.source,
        options.out,
        seed=options.seed,
        samples_per_class=options.samples_per_class,
        resize=options.resize,
        allow_partial=options.allow_partial,
        overwrite=options.overwrite,
        workers=options.workers,
        report=_note,
    )
    seconds = time.monotonic() - start
    for split, shards in manifest.splits.items():
        classes = len(manifest.class_ids(split))
        print(f"{split}: {manifest.images(split)} images of {classes} classes in {len(shards)} shards")
    images = sum(map(len, manifest.shards()))
    print(f"{options.out}: {progress.rate(images, sum(shard.bytes for shard in manifest.shards()), seconds)}")
    print(describe(manifest))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from dist_obdsd.data.manifest import load
    from dist_obdsd.data.mixing import describe
    from dist_obdsd.data.verify import verify

    start = time.monotonic()
    report = verify(options.shards, workers=options.workers, report=_note)
    if report.problems:
        raise InputError(f"{options.shards} has {len(report.problems)} problems; pack the data again")
    seconds = time.monotonic() - start
    print(f"{options.shards}: {report.images} images in {report.shards} shards, all as the manifest says")
    print(f"{options.shards}: {progress.rate(report.images, report.bytes, seconds)}")
    print(describe(load(options.shards)))
    return 0


def _train(options: argparse.Namespace) -> int:
    from dist_obdsd.training.stopping import StopSignals

    with StopSignals().on_duty() as stop:  # before the imports, which take seconds
        return _train_until(stop, options)


def _train_until(stop: "StopSignals", options: argparse.Namespace) -> int:
    with _joined(options) as (settings, rank):
        assert settings is not None
        return _train_on(rank, settings, stop, options)


def _train_on(rank: "Runtime", settings: "Config", stop: "StopSignals", options: argparse.Namespace) -> int:
    from dist_obdsd import collectives, runtime
    from dist_obdsd.training.rundir import free_name
    from dist_obdsd.training.terminal import build_terminal
    from dist_obdsd.training.trainer import Trainer

    every, size = settings.tracking.every_steps, settings.batch.global_size
    with build_terminal(rank.is_main, every, size, options.quiet, options.verbose) as terminal:
        if (trap := runtime.restart_trap(os.environ)) is not None:
            terminal.tell(trap)
        fresh = free_name(Path(settings.output), settings.name) if options.fresh else None
        if (name := collectives.from_main(fresh)) is not None:
            settings = settings.model_copy(update={"name": name})
        terminal.say(
            f"{settings.run_dir}: {rank.world_size} x {rank.device.type} ({rank.launch.launcher}), {settings.precision}"
        )
        summary = Trainer(settings, rank, stop, terminal).run()
        if summary["rows"]:
            terminal.tell(("" if options.quiet else "\n") + table(summary["rows"]))
        state = summary["meta"]["state"]
        colour = "green" if state == "finished" else "yellow"
        terminal.say(f"\n{progress.paint(state, colour, sys.stdout)}: {settings.run_dir}")
        if settings.tracking.kind == "mlflow":
            uri = settings.tracking.uri
            terminal.say(
                f"to see its curves: {uri if uri.startswith('http') else f'mlflow ui --backend-store-uri {uri}'}"
            )
    return 0


def _compare(options: argparse.Namespace) -> int:
    from dist_obdsd.study.compare import compare

    return compare(options)


def _evaluate(options: argparse.Namespace) -> int:
    from dist_obdsd import commands

    return commands.evaluate(options)


def _embed(options: argparse.Namespace) -> int:
    from dist_obdsd import commands

    return commands.embed(options)


def _export(options: argparse.Namespace) -> int:
    from dist_obdsd import commands

    return commands.export(options)


def _bench(options: argparse.Namespace) -> int:
    import importlib

    from dist_obdsd.study.bench import report

    check_writable(options.json, options.plot)
    bench = importlib.import_module(f"dist_obdsd.study.bench.{options.name}")
    rows = bench.run(options)
    print(report.table(rows))
    found = bench.findings(rows) if hasattr(bench, "findings") else {}
    for name, value in found.items():
        print(f"{name}: {value:.3g}")
    if options.json is not None:
        write_json(options.json, report.meta(options) | found, rows)
    compared = report.against(options.baseline, found, options.tolerance) if options.baseline is not None else []
    if compared:
        print(report.table(compared))
    if options.plot is not None:
        report.plot(options.plot, rows, **bench.PLOT)
    return 1 if any(row["verdict"] == "worse" for row in compared) else 0


def _status(options: argparse.Namespace) -> int:
    from dist_obdsd.config import load_config
    from dist_obdsd.training.rundir import read_status

    status = read_status(load_config(options.config, options.overrides).run_dir)
    print(status.get("state", "none"))
    if status.get("message"):
        print(status["message"], file=sys.stderr)
    return 0


def _figures(options: argparse.Namespace) -> int:
    from dist_obdsd.tracking.album import draw

    failed: list[str] = []
    for path in draw(options.run_dir, failed.append, options.overrides):
        print(path)
    for reason in failed:
        _note(reason)
    return 1 if failed else 0


def _replay(options: argparse.Namespace) -> int:
    from dist_obdsd.tracking.writer import replay

    replay(options.spool, options.uri, options.new_run, speaker(True))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    with _joined(options) as (settings, rank):
        from dist_obdsd import doctor

        doctor.examine(rank, settings, speaker(rank.is_main))
    return 0


@contextmanager
def _joined(options: argparse.Namespace) -> "Iterator[tuple[Config | None, Runtime]]":
    """The config, if one is given, and the process group that it asks for.

    Raises:
        InputError: on every rank, also where one rank alone cannot read its config: the others would wait for it.
    """
    settings, failure = None, None
    try:
        if options.config is not None:
            from dist_obdsd.config import load_config

            settings = load_config(options.config, options.overrides)
    except UserError as error:
        if not _launched():
            raise  # at once, without importing torch
        failure = error
    from dist_obdsd import collectives, runtime

    chosen: tuple[Any, ...] = ()
    if settings is not None:
        chosen = (settings.device, settings.threads, settings.timeout_seconds, settings.strategy == "deepspeed")
    with runtime.start(*chosen) as rank:
        with collectives.agree("reading the config"):
            if failure is not None:
                raise failure
        yield settings, rank


def _launched() -> bool:
    """Whether a launcher may have started other ranks."""
    return bool(os.environ.keys() & {"RANK", "SLURM_STEP_ID"})


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "pack": _pack,
    "verify": _verify,
    "train": _train,
    "compare": _compare,
    "evaluate": _evaluate,
    "embed": _embed,
    "export": _export,
    "bench": _bench,
    "status": _status,
    "figures": _figures,
    "replay": _replay,
    "doctor": _doctor,
}


def on_every_rank(load: Callable[[], Any]) -> Any:
    """Read something before the process group exists. Every rank reads the same, so one of them reports."""
    try:
        return load()
    except UserError as error:
        error.everywhere = True
        raise


def speaker(is_main: bool) -> Callable[[str], None]:
    return (lambda text: print(text, flush=True)) if is_main else (lambda text: None)


def _note(text: str) -> None:
    """Tell of something that went wrong, while there may be a progress bar."""
    progress.say(f"dist-obdsd: {text}")


def check_writable(*paths: Path | None) -> None:
    """Find out before the work whether its results have a place to go."""
    for path in paths:
        if path is not None and not path.absolute().parent.is_dir():
            raise InputError(f"cannot write {path}: its folder does not exist; make it or choose another")


def write_json(path: Path, meta: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """The one form of every ``--json`` file."""
    try:
        path.write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another file") from error


def table(rows: list[dict[str, Any]]) -> str:
    """Metrics as columns, protocols as lines, notes below."""
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    protocols = list(dict.fromkeys(row["protocol"] for row in rows))
    value = {(row["protocol"], row["metric"]): row["value"] for row in rows}
    width = max(len(name) for name in [*protocols, "protocol"])
    columns = [max(12, len(name) + 2) for name in metrics]
    lines = ["protocol".ljust(width) + "".join(name.rjust(w) for name, w in zip(metrics, columns, strict=True))]
    for protocol in protocols:
        cells = ["" if (v := value.get((protocol, name))) is None else f"{v:.4f}" for name in metrics]
        lines.append(protocol.ljust(width) + "".join(cell.rjust(w) for cell, w in zip(cells, columns, strict=True)))
    notes = {row["protocol"]: row["note"] for row in rows if "note" in row}
    return "\n".join(lines + [f"{protocol}: {note}" for protocol, note in notes.items()])
