"""``python -m tests.gpu``: check a device, measure training steps on it, and print a table.

Needs torch, torchvision, webdataset, pydantic and PyYAML, and this repository. Exits with 1 if a check or bench failed,
with 2 on bad usage or where there is no such device; a target that is missed is a figure, not a failure.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_obdsd.errors import InputError

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).parents[2]
BENCH = "bench"
PACKAGES = ("torch", "torchvision", "webdataset", "pydantic", "pyyaml")


def main(arguments: Sequence[str]) -> int:
    """Returns: the exit code."""
    options = _parser().parse_args(arguments)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks, and for the processes that are started
    # The ranks that checks and benches start import this repository from any folder.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    try:
        device = _prepared(options)
    except InputError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 2
    about = _about(device)
    print(f"{about['device']}: {_versions(about)}", flush=True)
    rows, failed = _checked(options, device)
    measured, waits, aims = _measured(options, device, failed)
    text = _report(about, rows, measured, waits, aims, failed)
    print(f"\n{text}", flush=True)
    if options.out is not None:
        (options.out / "gpu-check.md").write_text(text + "\n")
        whole = {"meta": about, "rows": rows + measured + waits + aims}
        (options.out / "gpu-check.json").write_text(json.dumps(whole, indent=1) + "\n")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what to check (default: cuda)")
    parser.add_argument("--quick", action="store_true", help="small sizes, for a CPU: a minute or less")
    parser.add_argument("--budget", type=float, default=240, help="seconds for the benches (default: 240; quick: 4)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write gpu-check.md and gpu-check.json there")
    parser.add_argument("--only", default="", metavar="NAME,...", help=f"some checks by name, or {BENCH}")
    return parser


def _prepared(options: argparse.Namespace) -> "torch.device":
    """The device, once everything that was asked for is there.

    Raises:
        InputError: it is not.
    """
    import torch

    from tests.gpu.checks import CHECKS

    names = [*CHECKS, BENCH]
    options.only = options.only.split(",") if options.only else names
    if unknown := [name for name in options.only if name not in names]:
        raise InputError(f"--only names {unknown[0]!r}; there are {', '.join(names)}")
    if not options.budget > 0:
        raise InputError(f"--budget is {options.budget:g}; give the seconds that the benches may take, above 0")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("torch finds no CUDA device here; --device cpu --quick checks what a CPU can")
    if options.out is not None:
        try:
            options.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write to {options.out}: {error.strerror}; choose another folder") from error
    if options.device == "cpu":
        return torch.device("cpu")
    torch.set_num_threads(max(1, min(8, len(os.sched_getaffinity(0)))))  # of the references on the CPU
    return torch.device("cuda", 0)


def _about(device: "torch.device") -> dict[str, Any]:
    """What the figures were found on."""
    import torch

    from dist_obdsd.tracking import provenance

    about = {"date": datetime.date.today().isoformat(), "device": provenance.hardware(device), **provenance.git()}
    about |= {name: importlib.metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "gpus": torch.cuda.device_count(),
        }
        about |= {
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
        }
    return about


def _versions(about: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {about[name]}"
        for name in (*PACKAGES, "python", "cuda", "cudnn", "gpus", "memory_gib")
        if name in about
    )


def _checked(options: argparse.Namespace, device: "torch.device") -> tuple[list[dict[str, Any]], list[str]]:
    """A row per check, each printed as it comes, and the names of those that failed."""
    from tests.gpu import checks

    rows = []
    for name in checks.CHECKS:
        if name in options.only:
            row = checks.run(name, device, options.quick)
            print(f"{row['verdict']:8}{name} ({row['seconds']:.1f} s): {row['found']}", flush=True)
            rows.append(row)
    return rows, [row["check"] for row in rows if row["verdict"] == "failed"]


def _measured(
    options: argparse.Namespace, device: "torch.device", failed: list[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of steps, of the wait for data, and of the targets beside them; adds to ``failed`` where a row failed."""
    from tests.gpu import bench, feeding

    if BENCH not in options.only:
        return [], [], []
    budget = min(options.budget, 4.0) if options.quick else options.budget
    found = []
    for measure in (lambda: bench.run(options.quick, budget), lambda: feeding.data_wait(device, options.quick)):
        try:
            found.append(measure())
        except Exception as error:  # what the checks and the other bench found counts nevertheless
            found.append([bench.failure(error)])
    rows, waits = found
    if any("failed" in row for row in rows + waits):
        failed.append(BENCH)
    return rows, waits, bench.targets(rows + waits)


def _report(
    about: dict[str, Any], rows: list[dict[str, Any]], measured: list[dict[str, Any]],
    waits: list[dict[str, Any]], aims: list[dict[str, Any]], failed: list[str],
) -> str:  # fmt: skip
    """All of it in Markdown."""
    from tests.gpu import bench

    parts = [f"### {about['date']}, {about['device']}", f"{_versions(about)}; commit {about['git_commit'][:12]}"]
    if rows:
        parts.append(bench.markdown(("check", "verdict", "seconds", "found"), rows))
    if measured:
        parts.append(bench.markdown(bench.COLUMNS, measured))
    if waits:
        parts += [bench.markdown(bench.WAITING, waits), bench.WAITING_MEANS]
    if aims:
        parts.append(bench.markdown(("target", "at most", "found", "verdict"), aims))
    parts.append(f"failed: {', '.join(failed)}" if failed else "all that ran is as it must be")
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
