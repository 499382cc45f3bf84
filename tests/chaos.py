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
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils._pytree import keystr, tree_flatten_with_path

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
STEPS_OF_AN_EPOCH = 3  # of SETTINGS on the tiny data
TIMES = ("seconds", "data_wait", "images_per_s", "data_wait_share")


class Job:
    """The ranks of one run, started one by one or by torchrun."""

    def __init__(self, folder: Path, name: str, ranks: int, *overrides: str, torchrun: bool = False) -> None:
        self.log = folder / f"{name}.log"
        line = runs.command("train", "tiny.yaml", f"name={name}", *SETTINGS, *overrides, ranks=ranks if torchrun else 0)
        with self.log.open("ab") as out:
            self.processes = [
                subprocess.Popen(
                    line, cwd=folder, env=runs.environment(own), stdout=out, stderr=out, start_new_session=True
                )
                for own in ([{}] if torchrun else runs.group_environments(ranks))
            ]

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


def difference(a: Any, b: Any) -> str | None:
    """A place where two results differ in a bit."""
    one, other = ({keystr(path): leaf for path, leaf in tree_flatten_with_path(result)[0]} for result in (a, b))
    for place in one | other:
        x, y = one.get(place, "nothing"), other.get(place, "nothing")
        if type(x) is not type(y) or not (torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y):
            return place
    return None


def steps_on_record(run: Path) -> int:
    try:
        return (run / "metrics.jsonl").read_text().count('"kind": "step"')
    except OSError:
        return 0


def wait_for(moment: str, job: Job, run: Path, draw: random.Random, last_step: int) -> bool:
    """Wait until a moment of this kind has come. False when the run finished before."""
    if moment == "start":
        time.sleep(draw.uniform(0, 4))
        return job.alive()
    steps = steps_on_record(run)
    goal = draw.randint(steps + 1, max(steps + 1, min(last_step, steps + 12)))
    deadline = time.monotonic() + runs.SECONDS
    while job.alive():
        assert time.monotonic() < deadline, job.log.read_text()[-3000:]
        steps = steps_on_record(run)
        if steps >= goal and moment == "write" and any((run / "checkpoints").glob(".*.writing")):
            return True
        if steps >= goal and (moment == "step" or (moment == "evaluation" and steps % STEPS_OF_AN_EPOCH == 0)):
            time.sleep(draw.uniform(0, 0.04))
            return job.alive()
        time.sleep(0.0005 if moment == "write" else 0.005)
    return False


def finished(folder: Path, name: str, ranks: int, *overrides: str) -> dict[str, Any]:
    """Start a run, or go on with it, to its end."""
    job = Job(folder, name, ranks, *overrides)
    codes = job.wait()
    assert not any(codes), job.log.read_text()[-3000:]
    return result(folder / "runs" / name)


def killed(
    folder: Path, name: str, ranks: int, overrides: tuple[str, ...], plan: list[tuple[str, int | None]], seed: int
) -> tuple[dict[str, Any], list[str]]:
    """Kill and restart one run.

    Args:
        plan: (moment, the rank to kill; None for all) for every kill.

    Returns:
        What it ended with, and a line per kill.
    """
    draw, run, lines = random.Random(seed), folder / "runs" / name, []
    for moment, victim in plan:
        job = Job(folder, name, ranks, *overrides)
        if not wait_for(moment, job, run, draw, 10**6):
            job.wait()
            break
        steps = steps_on_record(run)
        for rank, process in enumerate(job.processes):
            if victim in (None, rank):
                process.kill()
        killed_at = time.monotonic()
        job.wait()
        lines.append(f"kill {moment:10} rank {'all' if victim is None else victim!s:4} after step {steps:3}  "
                     f"others ended {time.monotonic() - killed_at:5.1f} s later")  # fmt: skip
    return finished(folder, name, ranks, *overrides), lines


def terminated(folder: Path, name: str, ranks: int, torchrun: bool, draw: random.Random) -> tuple[bool, str]:
    """Send SIGTERM at a random moment, to one rank or to torchrun: is what is left as it must be, and what is it?"""
    run = folder / "runs" / name
    job = Job(folder, name, ranks, "epochs=400", torchrun=torchrun)
    moment = draw.choice(("start", "step", "evaluation"))
    if moment == "start":
        # Before that there is a Python, or a torchrun, but nobody on duty.
        while sum(map(_catches_sigterm, job.members())) < ranks + torchrun:
            assert job.alive(), job.log.read_text()[-3000:]
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 4))
    else:
        assert wait_for(moment, job, run, draw, 40)
    members = job.members()
    for process in job.processes if torchrun or moment == "start" else [draw.choice(job.processes)]:
        process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    codes = job.wait()
    seconds = time.monotonic() - sent
    _, left = psutil.wait_procs(members, timeout=30)
    state = runs.status(run)["state"] if (run / "status.json").exists() else None
    saved = checkpoint.load(path)["position"]["global_step"] if (path := checkpoint.find(run)) else None
    good = state == "preempted" and saved is not None and not left
    good &= set(codes) == {1 if torchrun else os.EX_TEMPFAIL}
    return good, (f"SIGTERM to {'torchrun' if torchrun else 'rank':8} {moment:10} exit {codes} state {state} "
                  f"saved step {saved} left {len(left)}  {seconds:5.1f} s")  # fmt: skip


def _catches_sigterm(process: psutil.Process) -> bool:
    with contextlib.suppress(OSError):  # it may be gone
        caught = re.search(r"^SigCgt:\s(\w+)", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
        return bool(caught and int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)
    return False


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--kills", type=int, default=20, help="per way")
    options.add_argument("--stops", type=int, default=10, help="SIGTERMs")
    options.add_argument("--ways", nargs="*", default=list(WAYS))
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    folder, failures = Path(tempfile.mkdtemp(prefix="dist-obdsd-chaos-")), 0
    runs.make_images(folder / "images")
    runs.program("pack", "folder", "--source", "images", "--out", "packed", cwd=folder)
    (folder / "tiny.yaml").write_text(runs.CONFIG.replace("SHARDS", str(folder / "packed")))
    for way in chosen.ways:
        ranks, overrides = WAYS[way]
        draw, kills = random.Random(f"{chosen.seed} {way}"), 0
        reference = finished(folder, f"whole-{len(way)}-{ranks}", ranks, *overrides)
        while kills < chosen.kills:
            plan = [(MOMENTS[(kills + i) % len(MOMENTS)], draw.choice([None, *range(ranks)])) for i in range(5)]
            name = f"killed-{len(way)}-{ranks}-{kills}"
            found, lines = killed(folder, name, ranks, overrides, plan[: chosen.kills], draw.randrange(10**6))
            differs = difference(reference, found)
            failures += differs is not None
            for line in (*lines, "end  " + ("same bits" if differs is None else f"DIFFERS at {differs}")):
                print(f"{way:16} {line}", flush=True)
            kills += max(1, len(lines))
    for i in range(chosen.stops):
        good, line = terminated(folder, f"stopped-{i}", 2, i % 2 == 1, random.Random(f"{chosen.seed} stop {i}"))
        failures += not good
        print(line, flush=True)
    print(f"{failures} failures")
    shutil.rmtree(folder, ignore_errors=True)
    return 1 if failures else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
