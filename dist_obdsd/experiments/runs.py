"""A comparison: variants x seeds as runs of their own, and a report.

A comparison keeps no state but its runs: one that was left half-way goes on from what their folders say.
"""

import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from dist_obdsd.config import load_config
from dist_obdsd.console import NOTICE
from dist_obdsd.data import manifest as manifests
from dist_obdsd.data.from_config import check_world_size
from dist_obdsd.distributed.launch import read_launch
from dist_obdsd.errors import InputError, require
from dist_obdsd.experiments import variants as planning
from dist_obdsd.experiments.report import Report, make_folder
from dist_obdsd.experiments.run_status import FINISHED, RunStatus, check_folders, status_of
from dist_obdsd.experiments.variants import RunSpec
from dist_obdsd.tracking.tracker import Tracker, build_tracker
from dist_obdsd.training.preemption import PreemptionHandler
from dist_obdsd.training.run_dir import read_status

logger = logging.getLogger(__name__)

MODULES = {"dist-obdsd": "dist_obdsd", "torchrun": "torch.distributed.run"}
"""Program -> the module that this Python runs in its place."""


class Comparison:
    """The runs of a comparison, and the folder of its report."""

    def __init__(
        self, config: Path, overrides: Sequence[str], variants: str, seeds: str, grid: Sequence[str] = (), *,
        ranks: int | None = None, out: Path | None = None, flags: Sequence[str] = (), command_line: str = "",
    ) -> None:  # fmt: skip
        """Check everything that can be checked before a run starts.

        Args:
            config, overrides, variants, seeds, grid: as on the command line.
            ranks: processes of a run, by torchrun; None: one, without a launcher.
            out: folder of the report; None: beside the runs.
            flags: passed on to ``train``.
            command_line: said in the report.
        """
        chosen = planning.read_variants(variants)
        self.specs = planning.plan(config, overrides, chosen, planning.read_seeds(seeds), planning.read_grid(grid))
        self._config = load_config(config, [*overrides, *chosen[0].overrides])
        self.folder = out or Path(self._config.output) / f"{self._config.name}-comparison"
        if ranks is not None:
            require("--ranks", ranks, ranks > 0, "the number of processes of a run, 1 or more")
            for spec in self.specs:
                check_world_size(spec.config, ranks)
        roots = dict.fromkeys(spec.config.data.shards for spec in self.specs)  # variants may train on different data
        self._shards = {root: manifests.load(root) for root in roots}
        check_folders(self.specs, self._shards, ranks or 1)
        self._path, self._ranks, self._flags, self._command_line = config, ranks, flags, command_line
        self._baseline = planning.baseline_of(chosen)
        self.statuses: list[RunStatus] = []
        """One a run, after ``train`` or ``report``."""

    @property
    def missing(self) -> list[RunStatus]:
        return [status for status in self.statuses if status.state != FINISHED]

    def commands(self, tracked: bool = False) -> list[str]:
        """Return each run's command line, perhaps with the comparison's tracked run."""
        parent = self._parent() if tracked else None
        return [shlex.join(self._command(spec, parent)) for spec in self.specs]

    def report(self) -> Report | None:
        """Report the runs that are finished; None where there are none."""
        self.statuses = [status_of(spec) for spec in self.specs]
        return self._write_report(Tracker())

    def train(self, stop: PreemptionHandler) -> Report | None:
        """Train the runs that are not finished, and report; one that fails stops no other."""
        # A process that was started as one of several would hand its rank on to every run.
        if read_launch(os.environ).world_size > 1:
            raise InputError("compare starts the ranks of its runs itself; start it without a launcher, with --ranks N")
        parent = self._parent()
        state = "FAILED"
        try:
            self.statuses = [status_of(spec) for spec in self.specs]
            for number, spec in enumerate(self.specs):
                if not stop.requested:
                    title = f"[{number + 1}/{len(self.specs)}] {spec.run_dir}"
                    self.statuses[number] = _finish(spec, self._command(spec, parent), title, stop)
            report = self._write_report(parent)
            state = "KILLED" if stop.requested else "FAILED" if self.missing else "FINISHED"
        finally:
            parent.close(state)
        return report

    def _write_report(self, parent: Tracker) -> Report | None:
        if len(self.missing) == len(self.statuses):
            return None
        commands = [self._command_line, *self.commands()]
        report = Report(self._config.name, commands, self.statuses, self._baseline, self._shards)
        files = report.write(self.folder)
        # A metric keeps its first value at a step, and a comparison that goes on knows more.
        parent.metrics(report.means(), len(report.finished))
        for file in files:
            parent.artifact(file)
        return report

    def _parent(self) -> Tracker:
        """Return the tracked run above the runs, the same when the comparison goes on."""
        make_folder(self.folder)  # before hours of training end in a report that has no place
        config = self._config.model_copy(update={"name": f"{self._config.name}-comparison"})
        tracker = build_tracker(config, self.folder, "", None, {"comparison": self._command_line})
        tracker.await_run_id()
        return tracker

    def _command(self, spec: RunSpec, parent: Tracker | None = None) -> list[str]:
        """Return what trains a run, as a person would type it."""
        arguments = ["train", str(self._path), *spec.overrides, *self._flags]
        if parent is not None and parent.run_id:
            arguments.append(f"tracking.parent={parent.run_id}")
        if self._ranks:
            launcher = ["torchrun", "--standalone", "--nproc-per-node", str(self._ranks)]
            return [*launcher, "-m", "dist_obdsd", *arguments]
        return ["dist-obdsd", *arguments]


def _finish(spec: RunSpec, command: Sequence[str], title: str, stop: PreemptionHandler) -> RunStatus:
    """Train a run, unless it is finished."""
    status = status_of(spec)
    logger.info(f"{title}: {status.state}")
    if status.state == FINISHED:
        return status
    started = time.monotonic()
    status = _train(spec, command, stop)
    seconds = time.monotonic() - started
    if status.state == FINISHED:
        logger.info(f"{title}: finished after {seconds:.0f} s\n")
    else:
        logger.log(NOTICE, f"{title}: {status.state} after {seconds:.0f} s: {status.message}\n")
    return status


def _train(spec: RunSpec, command: Sequence[str], stop: PreemptionHandler) -> RunStatus:
    """Train a run in a process of its own, which gets this one's signals."""
    before = read_status(spec.run_dir)
    passed_on = False
    program, *arguments = command
    with subprocess.Popen([sys.executable, "-m", MODULES[program], *arguments]) as process:
        while process.poll() is None:  # Ctrl-C reaches the run, too, and it is waited for
            if stop.requested and not passed_on:
                process.terminate()
                passed_on = True
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
    status, after = status_of(spec), read_status(spec.run_dir)
    if status.state == FINISHED:  # launchers have exit codes of their own
        return status
    if after in (before, {}):
        ended = "before its first step; see its error above"
    elif after.get("state") == "running":
        ended = "without an error message"
    else:
        return status
    return RunStatus(spec, "failed", f"it ended with exit code {process.returncode} {ended}", {}, {})
