"""Numbers of a run, for ``metrics.jsonl``, the tracker and the terminal."""

import logging
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dist_obdsd import console
from dist_obdsd.config import Config
from dist_obdsd.config.base import flatten
from dist_obdsd.data.manifest import Manifest
from dist_obdsd.distributed import collectives
from dist_obdsd.distributed.launch import Runtime
from dist_obdsd.errors import RunError
from dist_obdsd.evaluation.retrieval import EvaluationResult
from dist_obdsd.tracking import provenance
from dist_obdsd.tracking.system_metrics import SystemMetrics, by_node
from dist_obdsd.tracking.tracker import Tracker, build_tracker
from dist_obdsd.training.progress_display import LOSSES, ProgressDisplay, format_losses
from dist_obdsd.training.run_dir import RunDir

logger = logging.getLogger(__name__)

FLAT = 0.01
"""Nats from uniform below which a target has next to nothing to distil."""
FROM_UNIFORM = "target_kl_to_uniform"
"""How far a step's targets were from uniform, in nats."""


class MetricsLogger:
    """Logger of a run; other ranks have no run folder, null tracker and display."""

    def __init__(self, config: Config, run_dir: RunDir | None, display: ProgressDisplay, runtime: Runtime) -> None:
        self.config, self.run_dir, self.display, self.runtime = config, run_dir, display, runtime
        self.tracker = Tracker()
        self.preempted = False
        """True when the tracked run ends as KILLED although nothing failed."""
        self._tracked = config.tracking.kind != "none"
        self._system = SystemMetrics() if self._tracked and runtime.launch.local_rank == 0 else None
        self._masked_in_a_row = self._defective = 0
        self._epoch: dict[str, list[float]] = {}
        """Each step's value in this epoch, of what ``log_epoch`` takes the mean."""
        self._warns_of_flat_target = config.distillation.needs_teacher

    @contextmanager
    def tracking(self, manifest: Manifest) -> Iterator[None]:
        """Write what the run is made from, and track it while the block lasts."""
        config, run_dir = self.config, self.run_dir
        if run_dir is None:
            yield
            return
        tags = {
            "launcher": self.runtime.launch.launcher,
            "world_size": str(self.runtime.world_size),
            "manifest": manifest.digest,
            **provenance.git(),
            "hardware": provenance.hardware(self.runtime.device),
        }
        versions = provenance.versions()
        self.tracker = tracker = build_tracker(config, run_dir.path, manifest.digest, self.tracker.run_id, tags)
        status = "FAILED"
        try:
            path = run_dir.write("config.yaml", config.to_yaml())
            run_dir.write("provenance.json", tags | versions)
            tracker.params(flatten(config.model_dump(mode="json")) | versions)
            tracker.dataset(**provenance.dataset(manifest, config.data.shards))
            tracker.artifact(path)
            yield
            status = "KILLED" if self.preempted else "FINISHED"
        finally:
            tracker.close(status)

    def state_dict(self) -> dict[str, Any]:
        return {"tracker": self.tracker.run_id}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.tracker = Tracker(run_id=state["tracker"])

    def log_step(self, host: Mapping[str, float], numbers: Mapping[str, float]) -> None:
        """Log one optimizer step, by what the host knows of it and ``TrainStep`` returned.

        Raises:
            RunError: on every rank, after too many non-finite steps in a row, or at the first in debug mode.
        """
        values = {name: value for name, value in (*host.items(), *numbers.items()) if math.isfinite(value)}
        step = int(values.pop("step"))
        complaint = self._complaint(numbers)
        if complaint is not None:
            logger.log(console.NOTICE, "step %d: %s", step, complaint)
        if self.run_dir is not None:
            self.run_dir.log("step", step, values)
        self.tracker.metrics(values, step)
        self.display.step(step, values)
        for name in values.keys() & {*LOSSES, FROM_UNIFORM}:
            self._epoch.setdefault(name, []).append(values[name])
        if complaint is not None and self.config.debug:
            raise RunError(f"step {step}: {complaint}; debug=true stops here, debug=false goes on")
        if self._masked_in_a_row >= self.config.max_nonfinite_steps:
            raise RunError(
                f"{self._masked_in_a_row} steps in a row up to step {step} had a NaN or infinite loss or "
                f"gradient; lower optim.lr or set optim.clip_norm, under another name"
            )

    def _complaint(self, numbers: Mapping[str, float]) -> str | None:
        self._masked_in_a_row = self._masked_in_a_row + 1 if numbers["masked"] else 0
        if numbers["masked"]:
            return "the loss or its gradient is not finite, so the step was left out"
        if share := numbers.get("target_defects", 0):
            self._defective += 1
            return f"{share:.1%} of the target's rows are not distributions (step {self._defective} so)"
        return None

    def log_system_metrics(self, steps: int, last: bool) -> None:
        """Track how busy every node is, every ``every_steps`` steps. Collective."""
        if self._tracked and (last or steps % self.config.tracking.every_steps == 0):
            readings = collectives.gather_json(self._system.read() if self._system else None)
            self.tracker.metrics(by_node(readings), steps)

    def log_epoch(self, title: str, epoch: int, global_step: int, steps: int, seconds: float, waited: float) -> None:
        """Log mean losses and speed of the part of an epoch that this process trained."""
        rate, share = steps * self.config.batch.global_size / seconds, waited / seconds
        self.log("epoch", {"seconds": seconds, "images_per_s": rate, "data_wait_share": share}, epoch, global_step)
        means = {name: math.fsum(values) / len(values) for name, values in self._epoch.items()}
        self._epoch.clear()
        losses = format_losses({name: means[name] for name in LOSSES if name in means})
        logger.info("%s: %s, %.1f s, %.0f images/s, %.1f%% data wait", title, losses, seconds, rate, 100 * share)
        if self._warns_of_flat_target and (nats := means.get(FROM_UNIFORM, FLAT)) < FLAT:
            self._warns_of_flat_target = False  # once says it
            temperature = self.config.distillation.temperature
            logger.log(
                console.NOTICE,
                f"the targets are {nats:.4f} nats from uniform, so they act much like distillation.target=uniform; "
                f"lower distillation.temperature from {temperature:g} to {min(0.1, temperature / 4):g}",
            )

    def log_evaluation(
        self, what: str, result: EvaluationResult, epoch: int, global_step: int, best: bool = False
    ) -> None:
        """Log an evaluation; ``best`` marks the best epoch so far."""
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
        excluded = f", {result.excluded} without a match left out" if result.excluded else ""
        mark = console.paint("  best epoch so far", "green", sys.stdout) if best else ""
        logger.info("%s: %s  (%d queries%s, %.1f s)%s", what, numbers, result.queries, excluded, result.seconds, mark)
        self.log(what, result.metrics, epoch, global_step)

    def log(self, kind: str, values: Mapping[str, float], epoch: int, global_step: int) -> None:
        """Log numbers of a kind, such as ``validation``, after ``global_step`` steps."""
        if self.run_dir is not None:
            self.run_dir.log(kind, global_step, {"epoch": epoch, **values})
        self.tracker.metrics({f"{kind}/{name}": value for name, value in values.items()}, global_step)
