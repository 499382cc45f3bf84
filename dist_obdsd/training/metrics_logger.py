"""What a run tells: the terminal, ``metrics.jsonl`` and the tracker hear the same numbers."""

import json
from collections.abc import Callable

from dist_obdsd.config import Config
from dist_obdsd.data.manifest import Manifest
from dist_obdsd.distributed import collectives
from dist_obdsd.distributed.launch import Runtime
from dist_obdsd.errors import RunError
from dist_obdsd.evaluation.evaluator import EvaluationResult
from dist_obdsd.tracking import provenance
from dist_obdsd.tracking.system_metrics import Usage, by_node
from dist_obdsd.tracking.tracker import Tracker, build_tracker
from dist_obdsd.training.run_dir import RunDir
from dist_obdsd.training.terminal import Terminal

WISHES = ("stop", "save")


class MetricsLogger:
    """Of one rank; those that do not record have no run folder, a null tracker and a silent terminal."""

    def __init__(self, config: Config, run_dir: RunDir | None, terminal: Terminal, first_of_node: bool = True) -> None:
        self.config, self.run_dir, self.terminal, self.say = config, run_dir, terminal, terminal.say
        self.tracker = Tracker()
        self._tracked = config.tracking.kind != "none"
        self._usage = Usage() if self._tracked and first_of_node else None
        self._nonfinite_in_a_row = 0
        self._defective = 0
        self._stepping = 0.0
        self._saving: list[float] = []

    def step(self, about: dict[str, float], numbers: dict[str, float]) -> None:
        """Record one optimizer step.

        Args:
            about: what the host knows of it; ``step`` counts from 0 over the whole run.
            numbers: what ``TrainStep`` returned.

        Raises:
            RunError: on every rank alike, after too many non-finite steps in a row, or at the first in debug mode.
        """
        step = int(about.pop("step"))
        values = {n: value for n, value in numbers.items() if n not in WISHES and abs(value) < float("inf")}
        complaint = self._complaint(numbers)
        if complaint is not None:
            self.terminal.tell(f"step {step}: {complaint}")
        if self.run_dir is not None:
            self.run_dir.log("step", step, about | values)
        self.tracker.metrics(about | values, step)
        self.terminal.step(step, about, values)
        if complaint is not None and self.config.debug:
            raise RunError(f"step {step}: {complaint}; debug=true stops here, debug=false goes on")
        if self._nonfinite_in_a_row >= self.config.max_nonfinite_steps:
            raise RunError(
                f"{self._nonfinite_in_a_row} steps in a row up to step {step} had a NaN or infinite loss or "
                f"gradient; lower optim.lr or set optim.clip_norm, under another name"
            )

    def _complaint(self, numbers: dict[str, float]) -> str | None:
        if numbers["masked"]:
            self._nonfinite_in_a_row += 1
            return "the loss or its gradient is not finite, so the step was left out"
        self._nonfinite_in_a_row = 0
        if share := numbers.get("target_defects", 0):
            self._defective += 1
            return f"{share:.1%} of the target's rows are no distribution (step {self._defective} so)"
        return None

    def usage(self, steps: int, last: bool) -> None:
        """Track how busy every node is, after every ``tracking.every_steps`` steps and an epoch's last. Collective."""
        if self._tracked and (last or steps % self.config.tracking.every_steps == 0):
            readings = collectives.gather_json(self._usage.read() if self._usage else None)
            self.tracker.metrics(by_node(readings), steps)

    def epoch(self, title: str, epoch: int, global_step: int, images: int, seconds: float, waited: float) -> None:
        """Record how quick the part of an epoch was that this process trained."""
        self._stepping += seconds
        rate, share = images / seconds, waited / seconds
        self.values("epoch", {"seconds": seconds, "images_per_s": rate, "data_wait_share": share}, epoch, global_step)
        self.say(f"{title}: {seconds:.1f} s, {rate:.0f} images/s, {share:.1%} waiting for data")

    def saved(self, seconds: float) -> None:
        """Record how long training stood still for a checkpoint: to collect its state, and to write or copy it."""
        self._saving.append(seconds)

    def cost_of_saving(self) -> None:
        """Tell what the checkpoints of this process cost, beside the time of its steps."""
        if self._stepping:
            total = sum(self._saving)
            self.say(
                f"{len(self._saving)} checkpoints: training stood still for {total:.2f} s, "
                f"{total / self._stepping:.2%} of the {self._stepping:.1f} s of its steps"
            )

    def measured(self, what: str, result: EvaluationResult, epoch: int, global_step: int) -> None:
        """Record an evaluation."""
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
        alone = f", {result.excluded} without a match left out" if result.excluded else ""
        self.say(f"{what}: {numbers}  ({result.queries} queries{alone}, {result.seconds:.1f} s)")
        self.values(what, result.metrics, epoch, global_step)

    def values(self, kind: str, values: dict[str, float], epoch: int, global_step: int) -> None:
        if self.run_dir is not None:
            self.run_dir.log(kind, global_step, {"epoch": epoch, **values})
        self.tracker.metrics({f"{kind}/{name}": value for name, value in values.items()}, global_step)


def begin_tracking(
    config: Config,
    run_dir: RunDir | None,
    manifest: Manifest,
    runtime: Runtime,
    run_id: str | None,
    say: Callable[[str], None],
) -> Tracker:
    """Write what the run is made from, into its folder and to the tracker, and return the tracker.

    Args:
        run_dir: None on ranks that do not record.
        run_id: of the tracked run that is to go on.
    """
    tags = {
        "launcher": runtime.launch.launcher,
        "world_size": str(runtime.world_size),
        "manifest": manifest.digest,
        **provenance.git(),
        "hardware": provenance.hardware(runtime.device),
    }
    versions = provenance.versions()
    tracker = build_tracker(config, config.run_dir, manifest.digest, run_id, tags, runtime.is_main, say)
    if run_dir is not None:
        path = run_dir.write_text("config.yaml", config.to_yaml())
        run_dir.write_text("provenance.json", json.dumps(tags | versions, indent=1) + "\n")
        tracker.params(provenance.flatten(config.model_dump(mode="json")) | versions)
        tracker.dataset(**provenance.dataset(manifest, config.data.shards))
        tracker.artifact(path)
    return tracker
