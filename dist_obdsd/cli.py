"""The command line. Imports are lazy, so that ``--help`` answers at once.

Exit codes: 0 done, 1 failed while running, 2 bad usage, configuration or input.
"""

import argparse
import atexit
import json
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_obdsd import __version__, progress
from dist_obdsd.errors import InputError, UserError, sentence
from dist_obdsd.machine import usable_cores

if TYPE_CHECKING:
    from dist_obdsd.training.stopping import StopSignals

BENCHES = ("objective", "manifold", "search", "loader")
LOST_PEER = ("Connection closed by peer", "Connection reset by peer")  # what gloo says of a rank that ended


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="dist-obdsd",
        description="Train and evaluate image embeddings on one or many GPUs, with self-distillation and diffusion "
        "over the batch manifold (OBD-SD).",
    )
    top.add_argument("--version", action="version", version=f"dist-obdsd {__version__}")
    # The DeepSpeed launcher puts this before the subcommand; the environment says the same.
    top.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    pack = commands.add_parser("pack", help="turn a benchmark's download or your own images into shards")
    pack.add_argument("recipe", help="a recipe's name (see shards/) or the path of a recipe YAML")
    pack.add_argument("overrides", nargs="*", metavar="options.name=value", help="settings that replace the recipe's")
    pack.add_argument("--source", type=Path, help="the download or your images: a folder, an archive or a list")
    pack.add_argument("--out", type=Path, required=True, help="the folder to make")
    pack.add_argument("--workers", type=int, default=usable_cores(), help="processes (default: all cores)")
    pack.add_argument("--seed", type=int, default=0, help="of the order inside the shards")
    pack.add_argument("--samples-per-class", type=int, default=2, help="images of a class that should stay together")
    pack.add_argument(
        "--resize", type=int, help="shrink images to this shorter side in pixels; default: copy the bytes"
    )
    pack.add_argument("--allow-partial", action="store_true", help="pack what is there of an incomplete source")
    pack.add_argument("--overwrite", action="store_true", help="replace shards that are already there")
    pack.set_defaults(run=_pack)

    verify = commands.add_parser("verify", help="check shards against their manifest")
    verify.add_argument("shards", help="a folder, or a URL or pipe: command")
    verify.add_argument("--workers", type=int, default=usable_cores(), help="processes (default: all cores)")
    verify.set_defaults(run=_verify)

    train = commands.add_parser("train", help="train and evaluate what a config describes")
    train.add_argument("config", type=Path, help="a YAML file, see configs/")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    train.add_argument("--fresh", action="store_true", help="do not resume: train under the next free name")
    _loudness(train)
    train.set_defaults(run=_train)

    compare = commands.add_parser("compare", help="train arms x seeds and say how far they differ")
    compare.add_argument("config", type=Path, help="a YAML file, see configs/")
    compare.add_argument("overrides", nargs="*", metavar="key=value", help="settings of every run")
    compare.add_argument(
        "--arms", required=True, metavar="ARM,ARM,...", help="distillation targets, or NAME:key=value,key=value"
    )
    compare.add_argument("--seeds", default="3", metavar="N", help="how many (default: 3), or which, such as 0,4,7")
    compare.add_argument("--grid", action="append", default=[], metavar="key=v,v", help="every arm with every value")
    compare.add_argument("--ranks", type=int, metavar="N", help="processes of a run, by torchrun (default: one, plain)")
    compare.add_argument("--out", type=Path, metavar="DIR", help="of the report (default: runs/NAME-comparison)")
    compare.add_argument("--json", type=Path, help="write the numbers to this file")
    compare.add_argument("--dry-run", action="store_true", help="print each run's state and command, and do nothing")
    compare.add_argument("--jobs", choices=("slurm",), help="print one command a line, for an array of jobs, and end")
    compare.add_argument("--report-only", action="store_true", help="report what is finished, and train nothing")
    _loudness(compare)
    compare.set_defaults(run=_compare)

    evaluate = commands.add_parser("evaluate", help="measure a checkpoint on shards, or a file of embeddings")
    evaluate.add_argument("checkpoint", type=Path, nargs="?", help="a .pt file or a run folder")
    evaluate.add_argument("--shards", help="the images to embed; with --embeddings, the images for --failures")
    evaluate.add_argument("--split", default="test")
    evaluate.add_argument("--embeddings", type=Path, metavar="FILE", help="measure these, an .npz or .parquet file")
    evaluate.add_argument("--json", type=Path, help="write the numbers to this file")
    evaluate.add_argument("--per-class", type=Path, metavar="CSV", help="write Recall@1 of every class to this file")
    evaluate.add_argument("--failures", type=Path, metavar="PNG", help="draw the worst queries into this file")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="settings such as evaluation.backend=torch")
    evaluate.set_defaults(run=_evaluate)

    embed = commands.add_parser("embed", help="write the embeddings of images to a file")
    embed.add_argument("checkpoint", type=Path, help="a .pt file or a run folder")
    embed.add_argument("--shards", help="embed a split of these shards")
    embed.add_argument("--split", default="test")
    embed.add_argument("--images", type=Path, metavar="DIR", help="or embed all images in and below this folder")
    embed.add_argument("--out", type=Path, metavar="FILE", help="the .npz or .parquet file to write")
    embed.add_argument("--index", type=Path, metavar="FILE", help="write a faiss index, and its keys beside it")
    embed.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    embed.add_argument("overrides", nargs="*", metavar="key=value", help="settings such as evaluation.batch_size=64")
    embed.set_defaults(run=_embed)

    export = commands.add_parser("export", help="write a checkpoint's network for torch.export and ONNX")
    export.add_argument("checkpoint", type=Path, help="a .pt file or a run folder")
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    export.add_argument("--format", default="torch,onnx", help="torch, onnx or both (default: torch,onnx)")
    export.add_argument("--images", type=Path, metavar="DIR", help="verify on these images (default: drawn letters)")
    export.add_argument("--shards", metavar="DIR", help="or on images of these shards")
    export.add_argument("--split", default="test")
    export.set_defaults(run=_export)

    bench = commands.add_parser("bench", help="measure a part of the system on this machine")
    bench.add_argument("name", choices=BENCHES)
    bench.add_argument("--sizes", type=_numbers, metavar="N,N,...", help="sizes to measure (default: the bench's own)")
    bench.add_argument("--worlds", type=_numbers, metavar="W,W,...", help="numbers of ranks (default: the bench's own)")
    bench.add_argument("--dim", type=int, default=128, help="embedding dimension (default: 128)")
    bench.add_argument("--threads", type=int, default=1, help="CPU threads per process (default: 1)")
    bench.add_argument("--budget", type=float, default=120, help="seconds that one case may take (default: 120)")
    bench.add_argument("--shards", metavar="DIR", help="loader: shards to read (default: images that it makes itself)")
    bench.add_argument("--workers", type=int, default=2, help="loader: decoding processes (default: 2)")
    bench.add_argument("--image-size", type=int, default=224, help="loader: pixels, where --sizes is not given (224)")
    bench.add_argument("--batch", type=int, default=112, help="loader: images in a batch (default: 112)")
    bench.add_argument("--json", type=Path, help="write the rows to this file")
    bench.add_argument("--plot", type=Path, help="draw the rows into this file, such as bench.png")
    bench.set_defaults(run=_bench)

    status = commands.add_parser("status", help="print a run's state: none, running, finished, preempted or failed")
    status.add_argument("config", type=Path, help="the run's YAML file, with the overrides it was started with")
    status.add_argument("overrides", nargs="*", metavar="key=value")
    status.set_defaults(run=_status)

    figures = commands.add_parser("figures", help="draw the figures of a run folder anew")
    figures.add_argument("run_dir", type=Path, metavar="RUN", help="a run folder; of a running one, what there is yet")
    figures.add_argument("overrides", nargs="*", metavar="key=value", help="settings such as data.shards=DIR")
    figures.set_defaults(run=_figures)

    replay = commands.add_parser("replay", help="send to the tracking server what it missed of a run")
    replay.add_argument("spool", type=Path, help="a run folder, or its tracking.jsonl")
    replay.add_argument("--uri", help="another server, which gets all of the run")
    replay.add_argument("--new-run", action="store_true", help="send all to a new run, when the old one is lost")
    replay.set_defaults(run=_replay)

    doctor = commands.add_parser("doctor", help="what this machine has, and where a config can run")
    doctor.add_argument("config", type=Path, nargs="?")
    doctor.add_argument("overrides", nargs="*", metavar="key=value")
    doctor.set_defaults(run=_doctor)
    return top


def _loudness(command: argparse.ArgumentParser) -> None:
    group = command.add_mutually_exclusive_group()
    group.add_argument("--quiet", action="store_true", help="print warnings and the final table only")
    group.add_argument("--verbose", action="store_true", help="print every step")


def program() -> None:
    """Entry point: run, then exit with the code that says how it went."""
    code = main(sys.argv[1:])
    if "deepspeed" in sys.modules:
        # Its globals hold process groups, whose native threads now and then abort the interpreter's own exit.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(arguments: list[str]) -> int:
    """Run one command.

    Returns:
        0, 1 or 2. Errors are one line on standard error; a defect of ours comes with its traceback.
    """
    options = parse(arguments)
    try:
        return options.run(options)
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


def _rank() -> str:
    return os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse, and take overrides wherever they stand: argparse itself wants all positionals in one row."""
    top = parser()
    options, rest = top.parse_known_args(arguments)
    strays = [text for text in rest if text.startswith("-") or "=" not in text]
    if strays or (rest and not hasattr(options, "overrides")):
        top.error(f"unrecognized arguments: {' '.join(strays or rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    options.command_line = shlex.join([top.prog, *arguments])
    return options


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
    from dist_obdsd.config import load_config

    settings = on_every_rank(lambda: load_config(options.config, options.overrides))
    from dist_obdsd import collectives, runtime
    from dist_obdsd.training.rundir import free_name
    from dist_obdsd.training.terminal import build_terminal
    from dist_obdsd.training.trainer import Trainer

    deepspeed = settings.strategy == "deepspeed"
    every, size = settings.tracking.every_steps, settings.batch.global_size
    with (
        runtime.start(settings.device, settings.threads, settings.timeout_seconds, deepspeed) as rank,
        build_terminal(rank.is_main, every, size, options.quiet, options.verbose) as terminal,
    ):
        if options.fresh:
            name = collectives.from_main(free_name(Path(settings.output), settings.name))
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
    if options.plot is not None:
        report.plot(options.plot, rows, **bench.PLOT)
    return 0


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
    settings = None
    if options.config is not None:
        from dist_obdsd.config import load_config

        settings = on_every_rank(lambda: load_config(options.config, options.overrides))
    from dist_obdsd import doctor, runtime

    chosen = (settings.device, settings.threads, settings.timeout_seconds) if settings else ()
    with runtime.start(*chosen) as rank:
        doctor.examine(rank, settings, speaker(rank.is_main))
    return 0


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


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


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
