"""``dist-obdsd compare``: arms times seeds as runs of their own, and what they say about each other.

A comparison keeps no state but its runs: one that was left half-way goes on from what their folders say.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dist_obdsd.cli.main import check_writable, write_json
from dist_obdsd.config import Config, load_config
from dist_obdsd.data.schedule import lanes_of
from dist_obdsd.distributed.launch import read_launch
from dist_obdsd.errors import InputError, RunError
from dist_obdsd.experiments import variants as planning
from dist_obdsd.experiments.report import Report, make
from dist_obdsd.experiments.run_status import (
    FINISHED,
    Outcome,
    check_folders,
    outcome_of,
    read_json,
    read_shards,
    state_of,
)
from dist_obdsd.experiments.variants import Child
from dist_obdsd.files import write_atomically
from dist_obdsd.tracking.tracker import Tracker, build_tracker
from dist_obdsd.training.preemption import PreemptionHandler
from dist_obdsd.training.run_dir import read_status


def compare(options: argparse.Namespace) -> int:
    """Plan, run what is not finished, report.

    Returns:
        0 when every run is finished, or a signal ended the comparison early.

    Raises:
        InputError: the arms are at fault, or a run that is there is of other settings.
        RunError: a run failed; the others were made and reported.
    """
    chosen = planning.read_arms(options.arms)
    seeds, grid = planning.read_seeds(options.seeds), planning.read_grid(options.grid)
    children = planning.plan(options.config, options.overrides, chosen, seeds, grid)
    study = load_config(options.config, [*options.overrides, *chosen[0].settings])
    folder = options.out or Path(study.output) / f"{study.name}-comparison"
    check_writable(options.json)
    if options.ranks is not None:
        if options.ranks < 1:
            raise InputError(f"--ranks is {options.ranks}; give the number of processes of a run, 1 or more")
        for child in children:
            lanes_of(0, options.ranks, child.settings.data.lanes)
    shards = read_shards(children)
    check_folders(children, shards, options.ranks or 1)
    lines = [shlex.join(command(options, child, printed=True)) for child in children]
    if options.dry_run:
        for child, line in zip(children, lines, strict=True):
            print(f"{state_of(child):12s}  {line}")
        return 0
    trains = not options.jobs and not options.report_only
    # A process that was started as one of several would hand its rank on to every run.
    if trains and read_launch(os.environ).world_size > 1:
        raise InputError("compare starts the ranks of its runs itself; start it without a launcher, with --ranks N")
    parent = Tracker() if options.report_only else parent_run(study, folder, options.command_line)
    if options.jobs:
        for line in lines:
            print(shlex.join([*shlex.split(line), *parent_settings(parent)]))
        return 0
    status = "FAILED"
    try:
        with PreemptionHandler().installed() as stop:
            failed = run_all(options, children, parent_settings(parent), stop) if trains else {}
        outcomes = [failed.get(child.run_dir) or outcome_of(child) for child in children]
        missing = [outcome for outcome in outcomes if outcome.state != FINISHED]
        if len(missing) < len(outcomes):
            commands = [options.command_line, *lines]
            report = Report(study.name, commands, outcomes, planning.baseline_of(chosen), shards)
            publish(report, folder, options.json, parent)
        status = "KILLED" if stop.requested else "FAILED" if missing else "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        parent.close(status)
    if stop.requested:
        print(f"stopped by a signal with {len(missing)} of {len(outcomes)} runs to go; the same command goes on")
    elif missing:
        names = ", ".join(f"{outcome.child.run_dir} {outcome.state}" for outcome in missing)
        raise RunError(
            f"{len(missing)} of {len(outcomes)} runs are not finished ({names}); see what they said above and in their "
            f"status.json; the same command goes on with them"
        )
    return 0


def publish(report: Report, folder: Path, numbers: Path | None, parent: Tracker) -> None:
    """Write the report, print its main table and log it."""
    files = report.write(folder)
    if numbers is not None:
        write_json(numbers, report.meta(), report.rows)
    print(f"\n{report.headline()}\n\nreport: {folder / 'report.md'}")
    # A metric keeps its first value at a step, and a comparison that goes on knows more.
    parent.metrics(report.means(), len(report.finished))
    for file in files:
        parent.artifact(file)


# ---- running -------------------------------------------------------------------------------------------------------


def command(options: argparse.Namespace, child: Child, printed: bool) -> list[str]:
    """What trains a run: with this very Python, or in the words that a person would use."""
    arguments = ["dist_obdsd", "train", str(options.config), *child.overrides]
    arguments += [flag for flag in ("--quiet", "--verbose") if getattr(options, flag[2:])]
    if options.ranks:
        launcher = ["torchrun"] if printed else [sys.executable, "-m", "torch.distributed.run"]
        return [*launcher, "--standalone", "--nproc-per-node", str(options.ranks), "-m", *arguments]
    return ["dist-obdsd", *arguments[1:]] if printed else [sys.executable, "-m", *arguments]


def run_all(
    options: argparse.Namespace, children: Sequence[Child], tracked: Sequence[str], stop: PreemptionHandler
) -> dict[Path, Outcome]:
    """Train one after the other what is not finished. A failure is told and the others go on.

    Returns:
        What has not become a finished run, by its folder.
    """
    failed = {}
    for number, child in enumerate(children, 1):
        state = state_of(child)
        if stop.requested:
            break
        print(f"[{number}/{len(children)}] {child.run_dir}: {state}", flush=True)
        if state == FINISHED:
            continue
        started = time.monotonic()
        outcome = run_one([*command(options, child, printed=False), *tracked], child, stop)
        told = ""
        if outcome.state != FINISHED:
            failed[child.run_dir] = outcome
            told = f": {outcome.message}"
        seconds = time.monotonic() - started
        print(f"[{number}/{len(children)}] {child.run_dir}: {outcome.state} after {seconds:.0f} s{told}\n", flush=True)
    return failed


def run_one(arguments: Sequence[str], child: Child, stop: PreemptionHandler) -> Outcome:
    """Train one run to its end in a process of its own, on which a signal is passed."""
    before = read_status(child.run_dir)
    process = subprocess.Popen(arguments)
    passed_on = False
    try:
        while process.poll() is None:
            if stop.requested and not passed_on:
                process.terminate()
                passed_on = True
            try:
                process.wait(0.2)
            except subprocess.TimeoutExpired:
                continue
    except KeyboardInterrupt:  # the terminal told the run, too
        process.wait()
        raise
    finally:
        if process.poll() is None:
            process.kill()
    outcome, after = outcome_of(child), read_status(child.run_dir)
    if outcome.state == FINISHED:  # launchers have exit codes of their own
        return outcome
    if after in (before, {}):
        message = f"it ended with exit code {process.returncode} before its first step, and said why above"
        return Outcome(child, "failed", message, {}, {})
    if after.get("state") == "running":
        return Outcome(child, "failed", f"it ended with exit code {process.returncode} without a word", {}, {})
    return outcome


# ---- tracking ------------------------------------------------------------------------------------------------------


def parent_run(settings: Config, folder: Path, command_line: str) -> Tracker:
    """The tracked run that the comparison's runs are children of; the same one when the comparison goes on."""
    make(folder)  # before hours of training end in a report that has no place
    memory = folder / "tracked.json"
    tags = {"comparison": command_line}
    shown = settings.model_copy(update={"name": f"{settings.name}-comparison"})
    tracker = build_tracker(shown, folder, "", read_json(memory).get("run_id"), tags, True, _complain)
    if (run_id := tracker.reach()) is not None:
        write_atomically(memory, (json.dumps({"run_id": run_id}) + "\n").encode())
    return tracker


def parent_settings(parent: Tracker) -> list[str]:
    """What a run is told of its parent."""
    return [f"tracking.parent={parent.run_id}"] if parent.run_id else []


def _complain(text: str) -> None:
    print(f"dist-obdsd: {text}", file=sys.stderr, flush=True)
