"""Model selection: when and on what a run is evaluated, and its best epoch."""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from dist_obdsd.config import Config
from dist_obdsd.console import NOTICE
from dist_obdsd.data.manifest import Manifest
from dist_obdsd.distributed.launch import Runtime
from dist_obdsd.evaluation.retrieval import EvaluationResult
from dist_obdsd.training.evaluation import evaluate_split, validation_subset
from dist_obdsd.training.preemption import PreemptionHandler

logger = logging.getLogger(__name__)

REMEMBERED = ("best_validation", "best_test", "last_test", "untrained")
Choice = dict[str, Any]
"""{"value": of the selection metric, "epoch": after so many epochs}; of the test set with all "metrics", too."""


def selection_value(metrics: Mapping[str, float], metric: str) -> float:
    """Return the value of a metric, the mean over galleries with names."""
    values = [value for name, value in metrics.items() if name.rpartition("/")[2] == metric]
    return math.fsum(values) / len(values)


class ModelSelector:
    """Evaluates the student and remembers the best epoch; methods are collective."""

    def __init__(
        self, config: Config, manifest: Manifest, validation_classes: list[int], student: Callable[[], nn.Module],
        runtime: Runtime, on_result: Callable[[str, EvaluationResult, int], None], preemption: PreemptionHandler,
    ) -> None:  # fmt: skip
        """Choose what to validate on, or raise InputError.

        Args:
            student: returns the network to evaluate, which each rank can call alone. Collective.
            on_result: called after every evaluation with its name, its result and the number of epochs before it.
            preemption: a request to stop ends an evaluation with ``StoppedError`` on every rank, and nothing is
                remembered of it.
        """
        self.config, self.manifest, self.student = config, manifest, student
        self.select_by = config.evaluation.select_by
        self.runtime, self.on_result, self.preemption = runtime, on_result, preemption
        self.classes = validation_subset(manifest, validation_classes, config)
        self.uses_test = config.evaluation.test and "test" in manifest.splits
        self.best_validation: Choice | None = None
        self.best_test: Choice | None = None
        self.last_test: Choice | None = None
        self.untrained: dict[str, float] | None = None

    def is_better(self, metrics: Mapping[str, float], best: Choice | None) -> bool:
        """Compare an epoch with the best one so far."""
        return best is None or selection_value(metrics, self.select_by) > best["value"]

    def before_training(self) -> None:
        """Evaluate the untrained network, if asked for, on test or validation images."""
        if self.config.evaluation.untrained and (self.uses_test or self.classes):
            split, classes = ("test", None) if self.uses_test else ("train", self.classes)
            self.untrained = self._evaluate("untrained", split, classes, 0)

    def out_of_patience(self, epoch: int) -> bool:
        """Tell if ``validation.patience`` is at its end. Not collective."""
        section, best = self.config.validation, self.best_validation
        return bool(section.patience and best and epoch - best["epoch"] >= section.patience * section.every)

    def after_epoch(self, epoch: int) -> bool:
        """Validate and test when it is time; return whether this is the best epoch so far."""
        if epoch % self.config.validation.every and epoch != self.config.epochs:
            return False
        validated = self._evaluate("validation", "train", self.classes, epoch) if self.classes else None
        if self.config.evaluation.best_test and self.uses_test:
            tested = self._evaluate("test", "test", None, epoch)
            value = selection_value(tested, self.select_by)
            self.last_test = {"value": value, "epoch": epoch, "metrics": tested}
            if self.is_better(tested, self.best_test):
                self.best_test = self.last_test
        if validated is None or not self.is_better(validated, self.best_validation):
            return False
        self.best_validation = {"value": selection_value(validated, self.select_by), "epoch": epoch}
        return True

    def has_tested(self, epoch: int, whole: bool) -> bool:
        """Tell if the test set was measured after so many whole epochs. Not collective."""
        return whole and self.last_test is not None and self.last_test["epoch"] == epoch

    def after_training(self, epoch: int, whole: bool, load_best: Callable[[], None]) -> list[dict[str, Any]]:
        """Evaluate the test set: the last weights, and the best by validation.

        Args:
            epoch: whole epochs trained.
            whole: whether the student is as it was after that epoch; false where steps of the next one followed.
            load_best: loads the weights of the best epoch by validation into the student.
        """
        results: list[tuple[str, int, dict[str, float]]] = []
        if self.untrained is not None and self.uses_test:
            results.append(("untrained", 0, self.untrained))
        if self.uses_test:
            known = self.last_test if self.has_tested(epoch, whole) else None
            metrics = known["metrics"] if known else self._evaluate("test", "test", None, epoch)
            results.append(("last", epoch, metrics))
            if self.best_validation is not None:
                best = self.best_validation["epoch"]
                if best != epoch or not whole:
                    load_best()
                    metrics = self._evaluate("test of best_validation", "test", None, best)
                results.append(("best_validation", best, metrics))
        elif self.best_validation and (note := self._made_worse({self.select_by: self.best_validation["value"]})):
            logger.log(NOTICE, "validation: %s", note)
        if self.best_test is not None:
            results.append(("best_test", self.best_test["epoch"], self.best_test["metrics"]))
        notes = {protocol: self._made_worse(metrics) for protocol, _, metrics in results}
        notes["best_test"] = "as in the papers: the epoch was chosen on the test set"
        return [
            {"protocol": protocol, "split": "test", "epoch": after, "metric": name, "value": value}
            | ({"note": note} if (note := notes[protocol]) else {})
            for protocol, after, metrics in results
            for name, value in metrics.items()
        ]

    def _made_worse(self, metrics: Mapping[str, float]) -> str | None:
        """Say which of MAP@R and Recall@1 training lowered, if it was measured before."""
        if self.untrained is None:
            return None
        known = [name.rpartition("/")[2] for name in metrics]
        looked_at = {self.select_by, next((name for name in known if "recall@" in name), "")} & {*known}
        fell, rose = list[str](), list[str]()
        for name in sorted(looked_at):
            before, after = selection_value(self.untrained, name), selection_value(metrics, name)
            if after != before:
                (fell if after < before else rose).append(f"{name} from {before:.4f} to {after:.4f}")
        if not fell:
            return None
        though = f", though it raised {rose[0]}" if rose else ""
        return (
            f"training made it worse: it lowered {' and '.join(fell)}{though}; lower optim.lr "
            f"({self.config.optim.lr:g}), or keep layers as they are (model.freeze)"
        )

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in REMEMBERED}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self).update({name: state.get(name) for name in REMEMBERED})  # older versions remembered less

    def _evaluate(self, what: str, split: str, classes: list[int] | None, epoch: int) -> dict[str, float]:
        # Figures show the test set or, where it must not be used, the validation classes.
        sample = self.config.tracking.figures and what == ("test" if self.uses_test else "validation")
        result = evaluate_split(
            self.student(), self.manifest, split, self.config, self.runtime, classes, self.preemption.between, sample
        )
        self.on_result(what, result, epoch)
        return result.metrics
