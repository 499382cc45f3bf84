"""``python -m tests.gpu PART``: check a device in parts of some three minutes.

    smoke   solvers, masked steps, no waits, a process group, uploads
    exact   losses and gradients beside float64, in chunks, compiled, on all GPUs
    runs    a resumed run, an evaluation, the wait for data

Each part writes its own file after every check, so that nothing is lost; ``--report`` merges them into a table. Needs
torch, torchvision, webdataset, pydantic and PyYAML, and this repository. Exits with 1 if a check failed, with 2 on bad
usage.
"""

import argparse
import importlib
import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

NEEDED = {"torch": "torch", "torchvision": "torchvision", "webdataset": "webdataset", "pydantic": "pydantic",
          "yaml": "pyyaml"}  # fmt: skip
PARTS = ("smoke", "exact", "runs")
Row = dict[str, Any]
Check = Callable[[Any, bool], str]
"""From a device, and whether it must be quick, to what was found."""


def main(arguments: Sequence[str]) -> int:
    """Returns: the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what to check (default: cuda)")
    parser.add_argument("--quick", action="store_true", help="small sizes, for a CPU")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), metavar="DIR", help="default: gpu-check")
    parser.add_argument("--only", metavar="NAME,...", help="some checks of the parts")
    parser.add_argument("--report", action="store_true", help="merge what is in DIR into gpu-check.md")
    options = parser.parse_args(arguments)
    if missing := [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]:
        parser.error(f"{', '.join(missing)} is not installed; pip install {' '.join(missing)}")
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks, and for the processes that are started
    import torch

    if options.device == "cuda" and options.parts and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; --device cpu --quick checks what a CPU can")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"cannot write to {options.out}: {error.strerror}; choose another folder")
    torch.set_num_threads(1 if options.device == "cpu" else max(1, min(8, len(os.sched_getaffinity(0)))))
    device = torch.device("cpu") if options.device == "cpu" else torch.device("cuda", 0)
    failed = [name for part in options.parts for name in _take(part, options, device)]
    if options.report:
        text = report(options.out)
        print(f"\n{text}", flush=True)
        (options.out / "gpu-check.md").write_text(text + "\n")
    return 1 if failed else 0


def _take(part: str, options: argparse.Namespace, device: Any) -> list[str]:
    """Run a part's checks, print and write each as it comes, and return the names of those that failed."""
    rows = list[Row]()
    for name, check in checks(part).items():
        if not options.only or name in options.only.split(","):
            rows.append(row := run(name, check, device, options.quick))
            print(f"{row['verdict']:8}{name} ({row['seconds']:.1f} s): {row['found']}", flush=True)
            written = json.dumps({"meta": about(device), "rows": rows}, indent=1)
            (options.out / f"gpu-{part}.json").write_text(written + "\n")
    return [row["check"] for row in rows if row["verdict"] == "failed"]


def checks(part: str) -> dict[str, Check]:
    """The checks of a part by name, cheap ones first."""
    found: dict[str, Check] = importlib.import_module(f"tests.gpu.{part}").CHECKS
    return found


def about(device: Any) -> Row:
    """Describe the device and the software."""
    import torch
    import torchvision

    from benchmarks import common
    from dist_obdsd.tracking import provenance

    described = common.meta(torch.get_num_threads()) | {"torchvision": torchvision.__version__}
    described["commit"] = provenance.git()["git_commit"][:12]
    if device.type == "cuda":
        described |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        described |= {"gpus": torch.cuda.device_count(), "gib": torch.cuda.mem_get_info(device)[1] >> 30}
    return described


def run(name: str, check: Check, device: Any, quick: bool) -> Row:
    """Run one check: ``check``, ``verdict`` (ok, skipped or failed), ``seconds`` and ``found``."""
    from dist_obdsd.errors import format_error
    from tests.gpu.rig import CheckError, Skipped

    started = time.perf_counter()
    try:
        verdict, found = "ok", check(device, quick)
    except (Skipped, CheckError) as reason:
        verdict, found = "skipped" if isinstance(reason, Skipped) else "failed", str(reason)
    except Exception as error:  # a defect, or a device that lacks something; the other checks go on
        traceback.print_exc()
        verdict, found = "failed", [line for line in format_error(error).splitlines() if line.strip()][-1][:300]
    return {"check": name, "verdict": verdict, "seconds": time.perf_counter() - started, "found": found}


def report(folder: Path) -> str:
    """Put together in Markdown what the parts wrote; what cannot be read is a line."""
    from benchmarks.common import table

    lines, rows = [], list[Row]()
    for part in PARTS:
        try:
            written = json.loads((folder / f"gpu-{part}.json").read_text())
        except (OSError, ValueError) as error:
            lines.append(f"{part}: nothing to read ({type(error).__name__})")
            continue
        lines.append(f"{part}: {', '.join(f'{name} {value}' for name, value in written['meta'].items())}")
        rows += [{"part": part} | row for row in written["rows"]]
    failed = [row["check"] for row in rows if row["verdict"] == "failed"]
    verdict = f"failed: {', '.join(failed)}" if failed else "all that ran is as it must be"
    return "\n\n".join([*lines, f"```\n{table(rows)}\n```", verdict])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
