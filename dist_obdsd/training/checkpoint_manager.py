"""A run's checkpoints: when and of what they are made, and resuming from one."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_obdsd import checkpoint
from dist_obdsd.config import Config, changed_settings
from dist_obdsd.distributed import collectives
from dist_obdsd.distributed.failures import raise_on_all_ranks
from dist_obdsd.distributed.shards import broadcast_state, whole_on_main
from dist_obdsd.errors import InputError
from dist_obdsd.losses.obdsd import OBDSDLoss
from dist_obdsd.models.teacher import ProgressiveTeacher, load_teacher_state
from dist_obdsd.training.metrics_logger import MetricsLogger
from dist_obdsd.training.model_selection import ModelSelector
from dist_obdsd.training.strategy import Strategy
from dist_obdsd.training.train_step import TrainProgress

logger = logging.getLogger(__name__)


@dataclass
class CheckpointManager:
    """Saves and restores one run; methods are collective unless they say otherwise."""

    config: Config
    is_main: bool
    manifest: str
    """Digest of the shards' manifest."""
    validation_classes: list[int]
    strategy: Strategy
    teacher: ProgressiveTeacher | None
    objective: OBDSDLoss
    progress: TrainProgress
    model_selector: ModelSelector
    metrics: MetricsLogger

    def __post_init__(self) -> None:
        self.folder = self.config.run_dir / "checkpoints"
        self._saved_at = time.monotonic()

    # ---- saving -----------------------------------------------------------------------------------------------------

    def should_save(self, global_step: int) -> bool:
        """Tell if a checkpoint is due after so many steps. Not collective."""
        every = self.config.checkpoint.every_steps
        return every is not None and global_step % every == 0

    def wants_save(self) -> bool:
        """Tell by rank 0's clock if the last checkpoint is too old. Not collective."""
        minutes = self.config.checkpoint.every_minutes
        return self.is_main and minutes is not None and time.monotonic() - self._saved_at > 60 * minutes

    def save(self, best: bool = False) -> None:
        """Write a checkpoint.

        Args:
            best: whether the epoch that just ended is the best by validation so far.

        Raises:
            RunError: on every rank, when it cannot be written.
        """
        started = self._saved_at = time.monotonic()
        state = self._state_dict()
        with raise_on_all_ranks("saving the checkpoint"):
            if self.is_main:
                path = checkpoint.save(self.folder, state, best=best, keep=self.config.checkpoint.keep)
                self._log_written(path, time.monotonic() - started)

    def _log_written(self, path: Path, seconds: float) -> None:
        mib, progress = path.stat().st_size / 2**20, self.progress
        logger.info("saved %s: %.1f MiB, training waited %.2f s for it", path.name, mib, seconds)
        self.metrics.log("checkpoint", {"mib": mib, "seconds": seconds}, progress.epoch, progress.global_step)
        # A tracking server is no place for files of this size, so it learns where they are.
        self.metrics.tracker.tags(checkpoint.pointers(self.folder))

    def _state_dict(self) -> dict[str, Any]:
        """The entries of a checkpoint; complete on rank 0. Collective."""
        state = {
            "config": self.config.model_dump(mode="json"),
            "manifest": self.manifest,
            "validation_classes": self.validation_classes,
            "teacher": self.teacher and {"network": self.teacher.network.state_dict(), "epoch": self.teacher.epoch},
            "scaler": None,
            **self.strategy.state_dict(),
            "objective": self.objective.ranking.state_dict(),
            "manifold_memory": self.objective.memory_MD,
            **self.progress.state_dict(),
            **self.model_selector.state_dict(),
            **self.metrics.state_dict(),
        }
        return whole_on_main(state)

    # ---- restoring --------------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Restore the run folder's last checkpoint, if it has one. Rank 0 decides which.

        Raises:
            InputError: on every rank, when it is of other settings, other shards or another network.
        """
        found = None
        with raise_on_all_ranks("finding the last checkpoint"):
            if self.is_main:
                found = checkpoint.find(self.folder)
        name = collectives.broadcast_object(found.name if found else None)
        if name is None:
            return
        with raise_on_all_ranks("resuming"):
            saved = checkpoint.load(self.folder / name)
            self._load_state_dict(saved)
        if self.teacher is not None:
            load_teacher_state(self.teacher, saved["teacher"])  # collective
        logger.info("resuming %s from %s: %d steps are done", self.config.run_dir, name, self.progress.global_step)

    def _load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore all but the teacher. Not collective."""
        run_dir = self.config.run_dir
        if changes := changed_settings(saved["config"], self.config.model_dump(mode="json")):
            raise InputError(
                f"{run_dir} was started with other settings ({'; '.join(changes)}); "
                f"use those, set another name, or start with --fresh"
            )
        if saved["manifest"] != self.manifest:
            raise InputError(
                f"{run_dir} was trained on shards with manifest {saved['manifest'][:12]} but "
                f"{self.config.data.shards} has {self.manifest[:12]}; point data.shards to the same shards"
            )
        try:
            self.objective.ranking.load_state_dict(saved["objective"])
            self.objective.memory_MD = saved["manifold_memory"]
            self.strategy.load_state_dict(saved)
        except RuntimeError as error:  # torch's first line names a class, the second a parameter
            raise InputError(
                f"the checkpoint in {run_dir} is of another network than its settings make here "
                f"({' '.join(str(error).split(chr(10))[1:2]).strip()}); use the versions in its provenance.json"
            ) from error
        for part in (self.progress, self.model_selector, self.metrics):
            part.load_state_dict(saved)

    def load_best(self) -> None:
        """Put the weights of the best epoch by validation into the student."""
        saved = None
        with raise_on_all_ranks("reading the best checkpoint"):
            if self.is_main:
                saved = checkpoint.load(self.folder / "best")["student"]
        broadcast_state(saved, self.strategy.student)  # other nodes may not see rank 0's folder

    def best_path(self) -> Path | None:
        """The best checkpoint by validation, else the last. Not collective."""
        return checkpoint.find(self.folder, "best") or checkpoint.find(self.folder)
