"""What a checkpoint holds: taken from the parts of a run, and put back into them."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from dist_obdsd.config import Config, changed_settings
from dist_obdsd.errors import InputError
from dist_obdsd.losses.obdsd import Objective
from dist_obdsd.models.teacher import ProgressiveTeacher
from dist_obdsd.training.ddp import DDPStrategy
from dist_obdsd.training.model_selection import ModelSelector
from dist_obdsd.training.train_step import TrainProgress


@dataclass
class RunState:
    config: Config
    manifest: str
    """Digest of the shards' manifest."""
    validation_classes: list[int]
    student: nn.Module
    teacher: ProgressiveTeacher | None
    objective: Objective
    strategy: DDPStrategy
    judge: ModelSelector

    def take(self, position: TrainProgress, pending_validation: bool, tracker: str | None) -> dict[str, Any]:
        """The entries of ``checkpoint``. Collective; complete on rank 0.

        Args:
            unjudged: whether the epoch before the position is still to be measured.
            tracker: the tracked run's id.
        """
        return {
            "config": self.config.model_dump(mode="json"),
            "manifest": self.manifest,
            "validation_classes": self.validation_classes,
            "student": self.student.state_dict(),
            "teacher": self.teacher.state() if self.teacher is not None else None,
            "optimizer": self.strategy.optimizer_state(),
            **self.objective.state(),
            "objective_optimizer": self.strategy.objective_optimizer_state(),
            "scaler": None,
            "position": vars(position).copy(),
            "unjudged": pending_validation,
            "tracker": tracker,
            **self.judge.state(),
        }

    def put_back(self, state: dict[str, Any]) -> tuple[TrainProgress, bool, str | None]:
        """Restore all but the teacher, whose loading is collective.

        Returns:
            What ``take`` was given.

        Raises:
            InputError: the checkpoint is of other settings, other shards or another network.
        """
        changes = changed_settings(state["config"], self.config.model_dump(mode="json"))
        if changes:
            raise InputError(
                f"{self.config.run_dir} was started with other settings ({'; '.join(changes)}); "
                f"use those, set another name, or start with --fresh"
            )
        if state["manifest"] != self.manifest:
            raise InputError(
                f"{self.config.run_dir} was trained on shards with manifest {state['manifest'][:12]} but "
                f"{self.config.data.shards} has {self.manifest[:12]}; point data.shards to the same shards"
            )
        try:
            self.objective.load(state, self.strategy.device)
            self.strategy.load(state["student"], state["optimizer"], state["objective_optimizer"])
        except RuntimeError as error:  # torch's first line names a class, the second a parameter
            raise InputError(
                f"the checkpoint in {self.config.run_dir} is of another network than its settings make here "
                f"({' '.join(str(error).split(chr(10))[1:2]).strip()}); use the versions in its provenance.json"
            ) from error
        self.judge.load(state)
        pending_validation = state.get("unjudged", False)  # older checkpoints have none
        return TrainProgress(**state["position"]), pending_validation, state["tracker"]
