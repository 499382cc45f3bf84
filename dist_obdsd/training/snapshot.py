"""What a checkpoint holds: taken from the parts of a run, and put back into them."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from dist_obdsd.config import Config, changed_settings
from dist_obdsd.errors import InputError
from dist_obdsd.model.teacher import ProgressiveTeacher
from dist_obdsd.objective.objective import Objective
from dist_obdsd.training.judge import Judge
from dist_obdsd.training.step import Position
from dist_obdsd.training.strategy import DDPStrategy


@dataclass
class Snapshot:
    settings: Config
    manifest: str
    """Digest of the shards' manifest."""
    validation_classes: list[int]
    student: nn.Module
    teacher: ProgressiveTeacher | None
    objective: Objective
    strategy: DDPStrategy
    judge: Judge

    def take(self, position: Position, unjudged: bool, tracker: str | None) -> dict[str, Any]:
        """The entries of ``checkpoint``. Collective; complete on rank 0.

        Args:
            unjudged: whether the epoch before the position is still to be measured.
            tracker: the tracked run's id.
        """
        return {
            "config": self.settings.model_dump(mode="json"),
            "manifest": self.manifest,
            "validation_classes": self.validation_classes,
            "student": self.student.state_dict(),
            "teacher": self.teacher.state() if self.teacher is not None else None,
            "optimizer": self.strategy.optimizer_state(),
            **self.objective.state(),
            "objective_optimizer": self.strategy.objective_optimizer_state(),
            "scaler": None,
            "position": vars(position).copy(),
            "unjudged": unjudged,
            "tracker": tracker,
            **self.judge.state(),
        }

    def put_back(self, state: dict[str, Any]) -> tuple[Position, bool, str | None]:
        """Restore all but the teacher, whose loading is collective.

        Returns:
            What ``take`` was given.

        Raises:
            InputError: the checkpoint is of other settings, other shards or another network.
        """
        changes = changed_settings(state["config"], self.settings.model_dump(mode="json"))
        if changes:
            raise InputError(
                f"{self.settings.run_dir} was started with other settings ({'; '.join(changes)}); "
                f"use those, set another name, or start with --fresh"
            )
        if state["manifest"] != self.manifest:
            raise InputError(
                f"{self.settings.run_dir} was trained on shards with manifest {state['manifest'][:12]} but "
                f"{self.settings.data.shards} has {self.manifest[:12]}; point data.shards to the same shards"
            )
        try:
            self.objective.load(state, self.strategy.device)
            self.strategy.load(state["student"], state["optimizer"], state["objective_optimizer"])
        except RuntimeError as error:  # torch's first line names a class, the second a parameter
            raise InputError(
                f"the checkpoint in {self.settings.run_dir} is of another network than its settings make here "
                f"({' '.join(str(error).split(chr(10))[1:2]).strip()}); use the versions in its provenance.json"
            ) from error
        self.judge.load(state)
        unjudged = state.get("unjudged", False)  # older checkpoints have none
        return Position(**state["position"]), unjudged, state["tracker"]
