"""Runs that are killed at random moments, again and again, until they finish; and what differs from an untouched one.

``python -m tests.chaos`` prints a table over many moments (``make chaos``).

    kill   one rank or all ranks get SIGKILL between two steps or inside one, inside a checkpoint's write, or inside an
           evaluation; the same command goes on, and at the end every bit must be that of a run that nobody touched
    term   one rank, or torchrun, gets SIGTERM; the run must say preempted, leave a checkpoint that loads and no process
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from dist_obdsd import checkpoint
from tests import runs

SETTINGS = (
    "precision=float32", "epochs=20", "timeout_seconds=20", "checkpoint.every_steps=2", "validation.fraction=0.25",
    "data.workers=0", "evaluation.batch_size=8", "ranking.name=proxy_anchor", "ranking.lr=0.01",
)  # fmt: skip
WAYS = {
    "ddp, 2 ranks": (2, ()),
    "ddp, 4 ranks": (4, ()),
    "zero 1, 2 ranks": (2, ("strategy=deepspeed", "deepspeed.stage=1")),
}
MOMENTS = ("step", "write", "evaluation", "start")
TIMES = ("seconds", "data_wait", "images_per_s", "data_wait_share")


@dataclass
class Job:
    """The ranks of one run, started one by one or by torchrun."""

    processes: list[subprocess.Popen[bytes]]
    log: Path

    @classmethod
    def start(cls, folder: Path, name: str, ranks: int, *overrides: str, torchrun: bool = False) -> "Job":
        log = folder / f"{name}.log"
        line = runs.command("train", "tiny.yaml", f"name={name}", *SETTINGS, *overrides, ranks=ranks if torchrun else 0)
        own = [{}] if torchrun else runs.group_environments(ranks)
        with log.open("ab") as out:
            return cls(
                [
                    subprocess.Popen(
                        line, cwd=folder, env=runs.environment(mine), stdout=out, stderr=out, start_new_session=True
                    )
                    for mine in own
                ],
                log,
            )

    def alive(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def members(self) -> list[psutil.Process]:
        found = []
        for process in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                one = psutil.Process(process.pid)
                found += [one, *one.children(recursive=True)]
        return found

    def wait(self, seconds: float = runs.SECONDS) -> list[int]:
        """The exit codes."""
        deadline = time.monotonic() + seconds
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            for member in self.members():
                member.kill()
            raise AssertionError(f"still running after {seconds:.0f} s:\n{self.log.read_text()[-3000:]}") from None


def result(run: Path) -> dict[str, Any]:
    """All that a run ended with and that must not depend on what befell it."""
    state = checkpoint.load(run)
    parts = {key: state[key] for key in ("student", "teacher", "optimizer", "objective", "objective_optimizer")}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [
        {k: v for k, v in row.items() if k not in TIMES} for row in rows if row["kind"] not in ("epoch", "checkpoint")
    ]
    return parts | {"metrics": kept, "summary": json.loads((run / "summary.json").read_text())["rows"]}


def difference(a: Any, b: Any, where: str = "") -> str | None:
    """The first place where two results differ in a bit."""
    if type(a) is not type(b) and not (isinstance(a, dict) and isinstance(b, dict)):  # OrderedDicts are copied to dicts
        return f"{where}: {type(a).__name__} and {type(b).__name__}"
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return f"{where}: {sorted(map(str, a.keys() ^ b.keys()))[:3]} on one side only"
        found = (difference(a[key], b[key], f"{where}/{key}") for key in a)
    elif isinstance(a, list):
        if len(a) != len(b):
            return f"{where}: {len(a)} and {len(b)} entries"
        found = (difference(x, y, f"{where}[{i}]") for i, (x, y) in enumerate(zip(a, b, strict=True)))
    else:
        same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        return None if same else where
    return next((text for text in found if text is not None), None)


def wait_for(moment: str, job: Job, run: Path, draw: random.Random, last_step: int) -> bool:
    """Wait until a moment of this kind has come. False when the run finished before."""
    steps = _steps(run)
    if moment == "start":
        time.sleep(draw.uniform(0, 4))
        return job.alive()
    goal = draw.randint(steps + 1, max(steps + 1, min(last_step, steps + 12)))
    deadline = time.monotonic() + runs.SECONDS
    while job.alive():
        assert time.monotonic() < deadline, job.log.read_text()[-3000:]
        if _steps(run) >= goal:
            if moment == "step":
                time.sleep(draw.uniform(0, 0.05))
                return job.alive()
            if moment == "write" and any((run / "checkpoints").glob(".*.writing")):
                return True
            if moment == "evaluation" and _steps(run) % STEPS_OF_AN_EPOCH == 0:
                time.sleep(draw.uniform(0, 0.03))
                return job.alive()
        time.sleep(0.0005 if moment == "write" else 0.005)
    return False


STEPS_OF_AN_EPOCH = 3  # of SETTINGS on the tiny data


def _steps(run: Path) -> int:
    """Steps on record."""
    try:
        return (run / "metrics.jsonl").read_text().count('"kind": "step"')
    except OSError:
        return 0


def finished(folder: Path, name: str, ranks: int, *overrides: str) -> dict[str, Any]:
    """Start a run, or go on with it, to its end."""
    job = Job.start(folder, name, ranks, *overrides)
    codes = job.wait()
    assert not any(codes), job.log.read_text()[-3000:]
    return result(folder / "runs" / name)


def killed(
    folder: Path, name: str, ranks: int, overrides: tuple[str, ...], plan: list[tuple[str, int | None]], seed: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Kill and restart one run.

    Args:
        plan: (moment, the rank to kill; None for all) for every kill.

    Returns:
        What it ended with, and a row per kill.
    """
    draw, run, rows = random.Random(seed), folder / "runs" / name, []
    for moment, victim in plan:
        job = Job.start(folder, name, ranks, *overrides)
        if not wait_for(moment, job, run, draw, 10**6):
            job.wait()
            break
        steps = _steps(run)
        for rank, process in enumerate(job.processes):
            if victim in (None, rank):
                process.kill()
        killed_at = time.monotonic()
        job.wait()
        others = time.monotonic() - killed_at
        rows.append({"moment": moment, "victim": "all" if victim is None else victim, "step": steps, "others": others})
    return finished(folder, name, ranks, *overrides), rows


def terminated(folder: Path, name: str, ranks: int, torchrun: bool, draw: random.Random) -> dict[str, Any]:
    """Send SIGTERM at a random moment, to one rank or to torchrun, and look at what is left."""
    run = folder / "runs" / name
    job = Job.start(folder, name, ranks, "epochs=400", torchrun=torchrun)
    moment = draw.choice(("start", "step", "evaluation"))
    if moment == "start":
        deadline = time.monotonic() + runs.SECONDS
        # Before that there is a Python, or a torchrun, but nobody on duty.
        while sum(map(_catches_sigterm, job.members())) < ranks + torchrun:
            assert time.monotonic() < deadline, job.log.read_text()[-3000:]
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 4))
    else:
        assert wait_for(moment, job, run, draw, 40)
    members = job.members()
    if torchrun:
        job.processes[0].send_signal(signal.SIGTERM)
    else:
        for process in [draw.choice(job.processes)] if moment != "start" else job.processes:
            process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    codes = job.wait()
    seconds = time.monotonic() - sent
    _, left = psutil.wait_procs(members, timeout=30)
    status = runs.status(run) if (run / "status.json").exists() else {}
    saved = checkpoint.find(run)
    steps = checkpoint.load(saved)["position"]["global_step"] if saved else None
    return {
        "moment": moment, "to": "torchrun" if torchrun else "rank", "codes": codes, "state": status.get("state"),
        "saved": steps, "left": len(left), "seconds": seconds,
    }  # fmt: skip


def _catches_sigterm(process: psutil.Process) -> bool:
    try:
        fields = dict(line.split(":\t") for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
    except (OSError, ValueError):
        return False
    return bool(int(fields["SigCgt"], 16) >> (signal.SIGTERM - 1) & 1)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--kills", type=int, default=20, help="per way")
    options.add_argument("--stops", type=int, default=10, help="SIGTERMs")
    options.add_argument("--ways", nargs="*", default=list(WAYS))
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="dist-obdsd-chaos-"))
    _prepare(folder)
    failures = 0
    for way in chosen.ways:
        ranks, overrides = WAYS[way]
        draw = random.Random(f"{chosen.seed} {way}")
        reference = finished(folder, f"whole-{len(way)}-{ranks}", ranks, *overrides)
        done = 0
        while done < chosen.kills:
            plan = [(MOMENTS[(done + i) % len(MOMENTS)], draw.choice([None, *range(ranks)])) for i in range(5)]
            name = f"killed-{len(way)}-{ranks}-{done}"
            found, rows = killed(folder, name, ranks, overrides, plan, draw.randrange(10**6))
            differs = difference(reference, found)
            failures += differs is not None
            for row in rows:
                print(f"{way:16} kill {row['moment']:10} rank {row['victim']!s:4} after step {row['step']:3}  "
                      f"others ended {row['others']:5.1f} s later", flush=True)  # fmt: skip
            print(f"{way:16} end  {'same bits' if differs is None else 'DIFFERS at ' + differs}", flush=True)
            done += max(1, len(rows))
    for i in range(chosen.stops):
        row = terminated(folder, f"stopped-{i}", 2, i % 2 == 1, random.Random(f"{chosen.seed} stop {i}"))
        good = row["state"] == "preempted" and row["saved"] is not None and not row["left"]
        good &= set(row["codes"]) == {1 if row["to"] == "torchrun" else os.EX_TEMPFAIL}
        failures += not good
        print(f"SIGTERM to {row['to']:8} {row['moment']:10} exit {row['codes']} state {row['state']} saved step "
              f"{row['saved']} left {row['left']}  {row['seconds']:5.1f} s", flush=True)  # fmt: skip
    print(f"{failures} failures")
    shutil.rmtree(folder, ignore_errors=True)
    return 1 if failures else 0


def _prepare(folder: Path) -> None:
    runs.make_images(folder / "images")
    done = runs.program("pack", "folder", "--source", "images", "--out", "packed", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "tiny.yaml").write_text(runs.CONFIG.replace("SHARDS", str(folder / "packed")))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
