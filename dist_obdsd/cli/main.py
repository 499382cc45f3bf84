"""The command line. Imports are lazy, so that ``--help`` answers at once.

Exit codes: 0 done, 1 failed while running, 2 bad usage, configuration or input.
"""

import argparse
import atexit
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_obdsd import console
from dist_obdsd.cli.parser import parse
from dist_obdsd.distributed.failures import raise_on_all_ranks
from dist_obdsd.errors import InputError, UserError, format_error

if TYPE_CHECKING:
    from dist_obdsd.config import Config
    from dist_obdsd.distributed.launch import Runtime
    from dist_obdsd.training.preemption import PreemptionHandler

logger = logging.getLogger(__name__)

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
        with console.log_to_terminal(_rank() == "0", getattr(options, "quiet", False)):
            code = _run(options)
        sys.stdout.flush()  # here, where a reader that has gone is not an error
        return code
    except UserError as error:
        _tell_launcher(error)
        # What every rank found alike is said once; what one rank found, only that rank can say.
        if not error.on_all_ranks or _rank() == "0":
            where = f"{error.where}: " if error.where and not error.on_all_ranks else ""
            print(f"{console.paint('dist-obdsd:', 'red', sys.stderr)} {where}{error}", file=sys.stderr, flush=True)
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
        print(f"dist-obdsd: {where}{format_error(error)}", file=sys.stderr, flush=True)
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
    from dist_obdsd.data.class_diversity import describe
    from dist_obdsd.data.packing.pack import pack
    from dist_obdsd.data.packing.recipes import load_recipe

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
    print(f"{options.out}: {console.rate(images, sum(shard.bytes for shard in manifest.shards()), seconds)}")
    print(describe(manifest))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from dist_obdsd.data.class_diversity import describe
    from dist_obdsd.data.manifest import load
    from dist_obdsd.data.packing.verify import verify

    start = time.monotonic()
    report = verify(options.shards, workers=options.workers, report=_note)
    if report.problems:
        raise InputError(f"{options.shards} has {len(report.problems)} problems; pack the data again")
    seconds = time.monotonic() - start
    print(f"{options.shards}: {report.images} images in {report.shards} shards, all as the manifest says")
    print(f"{options.shards}: {console.rate(report.images, report.bytes, seconds)}")
    print(describe(load(options.shards)))
    return 0


def _train(options: argparse.Namespace) -> int:
    from dist_obdsd.training.preemption import PreemptionHandler

    with PreemptionHandler().installed() as stop:  # before the imports, which take seconds
        return _train_until(stop, options)


def _train_until(stop: "PreemptionHandler", options: argparse.Namespace) -> int:
    with _joined(options) as (config, rank):
        assert config is not None
        return _train_on(rank, config, stop, options)


def _train_on(rank: "Runtime", config: "Config", stop: "PreemptionHandler", options: argparse.Namespace) -> int:
    from dist_obdsd.distributed import collectives, launch
    from dist_obdsd.training.progress_display import build_display
    from dist_obdsd.training.run_dir import free_name
    from dist_obdsd.training.trainer import Trainer

    if (trap := launch.restart_trap(os.environ)) is not None:
        logger.log(console.NOTICE, trap)
    fresh = free_name(Path(config.output), config.name) if options.fresh else None
    if (name := collectives.broadcast_object(fresh)) is not None:
        config = config.model_copy(update={"name": name})
    logger.info(
        f"{config.run_dir}: {rank.world_size} x {rank.device.type} ({rank.launch.launcher}), {config.precision}"
    )
    every, size = config.tracking.every_steps, config.batch.global_size
    with build_display(rank.is_main, every, size, options.quiet, options.verbose) as display:
        summary = Trainer(config, rank, stop, display).run()
    if summary["rows"]:
        logger.log(console.NOTICE, ("" if options.quiet else "\n") + table(summary["rows"]))
    state = summary["meta"]["state"]
    colour = "green" if state == "finished" else "yellow"
    logger.info(f"\n{console.paint(state, colour, sys.stdout)}: {config.run_dir}")
    if config.tracking.kind == "mlflow":
        uri = config.tracking.uri
        logger.info(f"to see its curves: {uri if uri.startswith('http') else f'mlflow ui --backend-store-uri {uri}'}")
    return 0


def _compare(options: argparse.Namespace) -> int:
    from dist_obdsd.experiments.runs import compare

    return compare(options)


def _evaluate(options: argparse.Namespace) -> int:
    from dist_obdsd.cli import evaluate as commands

    return commands.evaluate(options)


def _embed(options: argparse.Namespace) -> int:
    from dist_obdsd.cli import evaluate as commands

    return commands.embed(options)


def _export(options: argparse.Namespace) -> int:
    from dist_obdsd.cli import evaluate as commands

    return commands.export(options)


def _bench(options: argparse.Namespace) -> int:
    import importlib

    from benchmarks import report

    check_writable(options.json, options.plot)
    bench = importlib.import_module(f"benchmarks.{options.name}")
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
    from dist_obdsd.training.run_dir import read_status

    status = read_status(load_config(options.config, options.overrides).run_dir)
    print(status.get("state", "none"))
    if status.get("message"):
        print(status["message"], file=sys.stderr)
    return 0


def _figures(options: argparse.Namespace) -> int:
    from dist_obdsd.figures.run_figures import draw

    failed: list[str] = []
    for path in draw(options.run_dir, failed.append, options.overrides):
        print(path)
    for reason in failed:
        _note(reason)
    return 1 if failed else 0


def _replay(options: argparse.Namespace) -> int:
    from dist_obdsd.tracking.uploader import replay

    replay(options.spool, options.uri, options.new_run, speaker(True))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    with _joined(options) as (config, rank):
        from dist_obdsd.cli import doctor

        doctor.examine(rank, config, speaker(rank.is_main))
    return 0


@contextmanager
def _joined(options: argparse.Namespace) -> "Iterator[tuple[Config | None, Runtime]]":
    """The config, if one is given, and the process group that it asks for.

    Raises:
        InputError: on every rank, also where one rank alone cannot read its config: the others would wait for it.
    """
    config, failure = None, None
    try:
        if options.config is not None:
            from dist_obdsd.config import load_config

            config = load_config(options.config, options.overrides)
    except UserError as error:
        if not _launched():
            raise  # at once, without importing torch
        failure = error
    from dist_obdsd.distributed import launch

    chosen: tuple[Any, ...] = ()
    if config is not None:
        chosen = (config.device, config.threads, config.timeout_seconds, config.strategy == "deepspeed")
    with launch.start(*chosen) as rank:
        with raise_on_all_ranks("reading the config"):
            if failure is not None:
                raise failure
        yield config, rank


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
        error.on_all_ranks = True
        raise


def speaker(is_main: bool) -> Callable[[str], None]:
    return (lambda text: print(text, flush=True)) if is_main else (lambda text: None)


def _note(text: str) -> None:
    """Tell of something that went wrong, while there may be a progress bar."""
    console.say(f"dist-obdsd: {text}")


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
