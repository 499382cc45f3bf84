"""Arguments of the command line. Imports nothing heavy, for a quick ``--help``."""

import argparse
import textwrap
from pathlib import Path

from dist_obdsd import __version__
from dist_obdsd.machine import usable_cores


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse, with overrides anywhere: argparse itself wants positionals in one row."""
    top = parser()
    options, rest = top.parse_known_args(arguments)
    strays = [text for text in rest if text.startswith("-") or "=" not in text]
    if strays or (rest and "overrides" not in options):
        top.error(f"unrecognized arguments: {' '.join(strays or rest)}")
    if rest:
        options.overrides += rest
    options.arguments = arguments
    return options


def _path(text: str) -> Path:
    """Read a path. The shell leaves the ~ of ``--out=~/x`` as it is."""
    return Path(text).expanduser()


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
    _overrides(pack, "settings that replace the recipe's", "options.name=value")
    pack.add_argument("--source", type=_path, help="the download or your images: a folder, an archive or a list")
    pack.add_argument("--out", type=_path, required=True, help="the folder to make")
    pack.add_argument("--workers", type=int, default=usable_cores(), help="processes (default: all cores)")
    pack.add_argument("--seed", type=int, default=0, help="of the order inside the shards")
    pack.add_argument("--samples-per-class", type=int, default=2, help="images of a class that should stay together")
    smaller = "shrink images to this shorter side in pixels; default: copy the bytes"
    pack.add_argument("--resize", type=int, help=smaller)
    pack.add_argument("--allow-partial", action="store_true", help="pack what is there of an incomplete source")
    pack.add_argument("--overwrite", action="store_true", help="replace shards that are already there")

    verify = commands.add_parser("verify", help="check shards against their manifest")
    verify.add_argument("shards", help="a folder, or a URL or pipe: command")
    verify.add_argument("--workers", type=int, default=usable_cores(), help="processes (default: all cores)")

    train = commands.add_parser(
        "train", help="train and evaluate what a config describes", formatter_class=_NamesHelp, epilog=NAMES
    )
    _config(train, "a YAML file, see configs/", "settings that replace the file's")
    train.add_argument("--fresh", action="store_true", help="do not resume: train under the next free name")
    _loudness(train)

    compare = commands.add_parser("compare", help="train variants x seeds and report how far they differ")
    _config(compare, "a YAML file, see configs/", "settings of every run")
    variants = "distillation targets, or NAME:key=value,key=value"
    compare.add_argument("--variants", "--arms", required=True, metavar="VARIANT,...", help=variants)
    seeds = "how many (default: 3), or which: 0,4,7, or 0, (with a comma) for that one alone"
    compare.add_argument("--seeds", default="3", metavar="N", help=seeds)
    every = "every variant with every value"
    compare.add_argument("--grid", action="append", default=[], metavar="key=v,v", help=every)
    compare.add_argument("--ranks", type=int, metavar="N", help="processes of a run, by torchrun (default: one, plain)")
    compare.add_argument("--out", type=_path, metavar="DIR", help="of the report (default: runs/NAME-comparison)")
    compare.add_argument("--json", type=_path, help="write the numbers to this file")
    compare.add_argument("--dry-run", action="store_true", help="print each run's state and command, and do nothing")
    compare.add_argument("--jobs", choices=("slurm",), help="print one command a line, for an array of jobs, and end")
    compare.add_argument("--report-only", action="store_true", help="report what is finished, and train nothing")
    _loudness(compare)

    evaluate = commands.add_parser("evaluate", help="measure a checkpoint on shards, or a file of embeddings")
    evaluate.add_argument("checkpoint", type=_path, nargs="?", help=CHECKPOINT)
    _split(evaluate, "the images to embed; with --embeddings, the images for --failures")
    evaluate.add_argument("--embeddings", type=_path, metavar="FILE", help="measure these, an .npz or .parquet file")
    evaluate.add_argument("--json", type=_path, help="write the numbers to this file")
    evaluate.add_argument("--per-class", type=_path, metavar="CSV", help="write Recall@1 of every class to this file")
    evaluate.add_argument("--failures", type=_path, metavar="PNG", help="draw the worst queries into this file")
    _overrides(evaluate, "settings such as evaluation.backend=torch")

    embed = commands.add_parser("embed", help="write the embeddings of images to a file")
    embed.add_argument("checkpoint", type=_path, help=CHECKPOINT)
    _split(embed, "embed a split of these shards")
    embed.add_argument("--images", type=_path, metavar="DIR", help="or embed all images in and below this folder")
    embed.add_argument("--skip-broken", action="store_true", help="leave out images that cannot be read, and list them")
    embed.add_argument("--out", type=_path, metavar="FILE", help="the .npz or .parquet file to write")
    embed.add_argument("--index", type=_path, metavar="FILE", help="write a faiss index, and its keys beside it")
    embed.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    _overrides(embed, "settings such as evaluation.batch_size=64")

    search = commands.add_parser("search", help="find the images of a folder that are most like a query")
    _gallery(search, 10)
    search.add_argument("query", type=_path, nargs="+", help="image files to search for")
    search.add_argument("--html", type=_path, metavar="FILE", help="write one page with thumbnails to this file")

    serve = commands.add_parser("serve", help="search a folder of images in the browser")
    _gallery(serve, 24)
    serve.add_argument("--host", default="127.0.0.1", help="the address to listen at (default: this machine only)")
    serve.add_argument("--port", type=int, default=8080)

    export = commands.add_parser("export", help="write a checkpoint's network for torch.export and ONNX")
    export.add_argument("checkpoint", type=_path, help=CHECKPOINT)
    export.add_argument("--out", type=_path, required=True, metavar="DIR", help="the folder to make")
    export.add_argument("--format", default="torch,onnx", help="torch, onnx or both (default: torch,onnx)")
    export.add_argument("--images", type=_path, metavar="DIR", help="verify on these images (default: drawn letters)")
    _split(export, "or on images of these shards")

    run = "a run folder, or the run's YAML file with the overrides it was started with"
    status = commands.add_parser("status", help="print a run's state: none, running, finished, preempted or failed")
    _config(status, run)
    status.add_argument("--since", type=float, metavar="SECONDS", help="print none where it is older (date +%%s)")

    _config(commands.add_parser("stop", help="let a run save and end, from any machine that sees its folder"), run)

    figures = commands.add_parser("figures", help="draw the figures of a run folder anew")
    figures.add_argument("run_dir", type=_path, metavar="RUN", help="a run folder; of a running one, what there is yet")
    _overrides(figures, "settings such as data.shards=DIR")

    replay = commands.add_parser("replay", help="send to the tracking server what it missed of a run")
    replay.add_argument("run_dir", type=_path, metavar="RUN", help="a run folder, or its tracking.jsonl")
    replay.add_argument("--uri", help="another server, which gets all of the run")
    replay.add_argument("--new-run", action="store_true", help="send all to a new run, when the old one is lost")

    doctor = commands.add_parser("doctor", help="what this machine has, and where a config can run")
    doctor.add_argument("config", type=_path, nargs="?")
    _overrides(doctor, "settings that replace the file's")
    doctor.add_argument("--download", action="store_true", help="fetch the config's pretrained weights")
    return top


CHECKPOINT = "a run folder or a .pt file"


def _config(command: argparse.ArgumentParser, what: str, overrides: str | None = None) -> None:
    command.add_argument("config", type=_path, help=what)
    _overrides(command, overrides)


def _overrides(command: argparse.ArgumentParser, what: str | None, metavar: str = "key=value") -> None:
    # Without a default, argparse lists them among the arguments that are required.
    command.add_argument("overrides", nargs="*", default=[], metavar=metavar, help=what)


def _split(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("--shards", metavar="DIR", help=what)
    command.add_argument("--split", default="test", help="of the shards (default: test)")


def _gallery(command: argparse.ArgumentParser, top: int) -> None:
    command.add_argument("checkpoint", type=_path, metavar="RUN", help=CHECKPOINT)
    command.add_argument("--gallery", type=_path, required=True, metavar="DIR", help="the folder of images")
    command.add_argument("--top", type=int, default=top, metavar="N", help=f"how many images to find (default: {top})")
    where = "a file that keeps the embeddings (default: in RUN/search/)"
    command.add_argument("--index", type=_path, metavar="NPZ", help=where)


def _loudness(command: argparse.ArgumentParser) -> None:
    group = command.add_mutually_exclusive_group()
    group.add_argument("--quiet", action="store_true", help="print warnings and the final table only")
    group.add_argument("--verbose", action="store_true", help="print every step, and details of every epoch")


NAMES = "the names that settings choose between"


class _NamesHelp(argparse.RawDescriptionHelpFormatter):
    """Help that ends with the registered names, read when it is printed."""

    def add_text(self, text: str | None) -> None:
        super().add_text(_registered_names() if text == NAMES else text)


def _registered_names() -> str:
    from dist_obdsd.config import registry

    parts = (registry.LOSSES, registry.TARGETS, registry.METRICS, registry.BACKBONES, registry.STRATEGIES)
    width = max(len(part.setting) for part in parts)
    lines = [
        textwrap.fill(f"  {part.setting:{width}}  {', '.join(part.choices)}", 110, subsequent_indent=" " * (width + 4))
        for part in parts
    ]
    return "\n".join([f"{NAMES}:", *lines])
