"""The training loop, from a checked config to a summary, on every rank alike."""

import logging
import time
from collections.abc import Iterable
from contextlib import closing
from typing import Any

import torch

from dist_obdsd import machine
from dist_obdsd.config import Config
from dist_obdsd.config.base import flatten
from dist_obdsd.data import manifest as manifests
from dist_obdsd.data.from_config import check_world_size, classes_from
from dist_obdsd.data.shard_reader import check_files
from dist_obdsd.data.stream import TrainStream
from dist_obdsd.data.transforms import load_augment
from dist_obdsd.distributed import collectives
from dist_obdsd.distributed.collectives import assert_equal_across_ranks
from dist_obdsd.distributed.failures import assert_same_config, raise_on_all_ranks
from dist_obdsd.distributed.launch import Runtime
from dist_obdsd.errors import InputError, StoppedError
from dist_obdsd.evaluation.retrieval import EvaluationResult
from dist_obdsd.figures.run_figures import RunFigures
from dist_obdsd.losses.build import build_objective, log_objective
from dist_obdsd.models.embedder import build_embedder, log_batch_norm
from dist_obdsd.models.precision import check_precision, compile_networks
from dist_obdsd.models.teacher import ProgressiveTeacher, check_identical
from dist_obdsd.training.checkpoint_manager import CheckpointManager
from dist_obdsd.training.evaluation import check_evaluable
from dist_obdsd.training.failures import report_failure
from dist_obdsd.training.metrics_logger import MetricsLogger
from dist_obdsd.training.model_selection import ModelSelector
from dist_obdsd.training.preemption import PreemptionHandler
from dist_obdsd.training.progress_display import ProgressDisplay
from dist_obdsd.training.run_dir import Attempt, RunDir, read_json, read_status
from dist_obdsd.training.strategy import build_strategy
from dist_obdsd.training.train_step import DelayedMetrics, Numbers, TrainProgress, TrainStep

logger = logging.getLogger(__name__)


class Trainer:
    """One run on one rank. ``run`` does everything."""

    def __init__(
        self, config: Config, runtime: Runtime, preemption: PreemptionHandler, display: ProgressDisplay
    ) -> None:
        """Check and build everything that a first step needs. Collective.

        Raises:
            InputError: on every rank, when data, weights or run folder do not fit.
        """
        self.config, self.runtime, self.preemption, self.display = config, runtime, preemption, display
        if runtime.device.type == "cpu":
            machine.tune_malloc()
        assert_same_config(flatten(config.model_dump(mode="json")) | {"device": runtime.device.type})  # not "auto"
        self._read_shards()
        self._build_networks()
        self.progress = TrainProgress()
        self.stop_requested = self.save_requested = False  # by any rank
        self.run_dir: RunDir | None = None
        with raise_on_all_ranks("opening the run folder"):
            if runtime.is_main:
                self.run_dir = RunDir(config.run_dir)
                preemption.watch(config.run_dir)
        self.attempt = Attempt(config.run_dir, collectives.broadcast_object(Attempt(config.run_dir).id))
        self.metrics = MetricsLogger(config, self.run_dir, display, runtime)
        self.delayed = DelayedMetrics(lag=0 if config.debug else 1 if runtime.device.type == "cpu" else 8)
        self.figures = RunFigures(self.run_dir.path if self.run_dir and config.tracking.figures else None)
        self.model_selector = ModelSelector(
            config, self.manifest, self.validation_classes, self.strategy.whole_student, runtime, self._log_evaluation,
            preemption,
        )  # fmt: skip
        self.checkpoints = CheckpointManager(
            config, runtime.is_main, self.manifest.digest, self.validation_classes, self.strategy, self.teacher,
            self.objective, self.progress, self.model_selector, self.metrics,
        )  # fmt: skip

    def _read_shards(self) -> None:
        """Read the manifest and check that it fits the config."""
        config, runtime = self.config, self.runtime
        with raise_on_all_ranks("reading the shards"):
            self.manifest = manifests.load(config.data.shards)
            self.train_classes, self.validation_classes = classes_from(config, self.manifest)
            check_evaluable(self.manifest, config, self.validation_classes)
            check_world_size(config, runtime.world_size)
            if runtime.launch.local_rank == 0:  # a cut test shard would else be met after the training
                splits = ["train", *(["test"] if config.evaluation.test else [])]
                shards = tuple(shard for name in splits for shard in self.manifest.splits.get(name, ()))
                check_files(config.data.shards, shards, sizes=True)
            if ":" in config.data.augment:
                load_augment(config.data.augment)
        assert_equal_across_ranks(f"the manifest of {config.data.shards}", self.manifest.digest, InputError)

    def _build_networks(self) -> None:
        """Build student, teacher, objective and the step that trains them."""
        config, runtime = self.config, self.runtime
        with raise_on_all_ranks("building the network"):
            check_precision(config, runtime.device)
            self.student = build_embedder(config, runtime.device)
            log_batch_norm(self.student, config.model, runtime.world_size)
            self.objective = build_objective(config, self.train_classes, runtime.device)
            log_objective(config, runtime.world_size)
        self.teacher = ProgressiveTeacher(self.student) if config.distillation.needs_teacher else None
        # A run's images have one shape, so cuDNN looks once for its quickest kernels; they may not repeat their bits.
        torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
        compile_networks(config, runtime, self.student, self.teacher)
        own = list(self.objective.ranking.named_parameters())
        self.strategy = build_strategy(self.student, config, runtime, own)
        if self.teacher is not None:
            self.strategy.shard(self.teacher.network, teacher=True)
        self.step = TrainStep(config, runtime, self.strategy, self.teacher, self.objective, self.train_classes)

    # ---- the run ----------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train, evaluate, record. Collective.

        Returns:
            The summary, the same on every rank. Its ``meta.state`` is finished, or preempted when a rank was asked to
            stop.
        """
        try:
            with report_failure(self.config, self.attempt, self.runtime.rank, self.progress):
                self.checkpoints.resume()
                if (summary := self._finished_before()) is not None:
                    return summary
                with raise_on_all_ranks("preparing the run folder"):
                    if self.run_dir is not None:
                        self.attempt.write_status("running", "")
                        tested = self.model_selector.has_tested(self.progress.epoch, self.progress.step == 0)
                        self.run_dir.cut_metrics(self.progress.global_step, tested, self.progress.pending_validation)
                with self.metrics.tracking(self.manifest):
                    return self._run()
        finally:
            if self.run_dir is not None:
                self.run_dir.close()

    def _run(self) -> dict[str, Any]:
        try:
            with raise_on_all_ranks("starting"):
                self.preemption.check()
            if self.progress.global_step == 0:
                self.model_selector.before_training()
            if self.progress.pending_validation:
                self._validate()
            self._train()
        except StoppedError:
            self.strategy.sync_buffers()
            self._save()
            return self._preempted()
        try:
            return self._finish()
        except StoppedError:  # the last checkpoint has everything, and the student may hold the best epoch's weights
            return self._preempted()

    def _train(self) -> None:
        """Train from the current position to the last epoch or to ``max_steps``."""
        if self._is_complete():
            return
        with raise_on_all_ranks("opening the stream"):
            stream = TrainStream(
                self.manifest, self.train_classes, self.config, self.runtime.rank, self.runtime.world_size,
                self.progress.epoch, self.progress.step, pinned=self.runtime.device.type == "cuda",
            )  # fmt: skip
        with closing(stream):
            while not self._is_complete():
                steps = stream.plan(self.progress.epoch).steps
                self._train_epoch(stream)
                self.strategy.sync_buffers()
                if self.progress.step < steps:  # max_steps ends the run inside an epoch
                    self._save()
                else:
                    self._promote_teacher()
                    self._validate()

    def _train_epoch(self, stream: TrainStream) -> None:
        """Take the remaining steps of the current epoch.

        Raises:
            StoppedError: on every rank, when any rank was asked to stop.
        """
        config, progress = self.config, self.progress
        plan, epoch = stream.plan(progress.epoch), progress.epoch
        title = f"epoch {epoch + 1}/{config.epochs}"
        repeated = f", {plan.repeated} class repetitions" if plan.repeated else ""
        logger.debug("%s: %d steps, %.1f%% of the reachable images%s", title, plan.steps, 100 * plan.coverage, repeated)
        left = (config.epochs - epoch) * plan.steps - progress.step
        if config.max_steps is not None:
            left = min(left, config.max_steps - progress.global_step)
        self.display.begin(title, progress.step, plan.steps, left)
        self.strategy.network.train()
        started, waited, first = time.perf_counter(), 0.0, progress.step
        while progress.step < plan.steps and not self._reached_max_steps() and not self.stop_requested:
            step_started = time.perf_counter()
            batch = next(stream)
            data_wait = time.perf_counter() - step_started
            stop, save = self.preemption.requested, self.checkpoints.wants_save()
            names, numbers = self.step(batch, progress, progress.step / plan.steps, stop, save)
            host: Numbers = {
                "step": progress.global_step,
                "epoch": epoch,
                "ramp": epoch / config.epochs,
                "data_wait": data_wait,
                "seconds": time.perf_counter() - step_started,
            }
            progress.step += 1
            progress.global_step += 1
            waited += data_wait
            self._log_steps(self.delayed.push(host, names, numbers))
            self.metrics.log_system_metrics(progress.global_step, last=progress.step == plan.steps)
            save = self.save_requested or self.checkpoints.should_save(progress.global_step)
            if save and progress.step < plan.steps and not self.stop_requested:
                self._log_steps(self.delayed.drain())  # the metrics must reach as far as the checkpoint
                self._save()
        self._log_steps(self.delayed.drain())
        self.display.close()
        if progress.step > first:
            self.figures.keep_batch(self.step.latest, epoch)
            seconds = time.perf_counter() - started
            self.metrics.log_epoch(title, epoch, progress.global_step, progress.step - first, seconds, waited)
        if self.stop_requested and progress.step < plan.steps:  # else the epoch ends first
            raise StoppedError("a rank was asked to stop")

    def _log_steps(self, steps: Iterable[tuple[Numbers, Numbers]]) -> None:
        """Log the steps whose numbers have arrived, and note what ranks requested."""
        for host, numbers in steps:
            self.stop_requested |= numbers.pop("stop_requested") > 0
            self.save_requested |= numbers.pop("save_requested") > 0
            self.metrics.log_step(host, numbers)

    def _log_evaluation(self, what: str, result: EvaluationResult, epoch: int) -> None:
        selector = self.model_selector
        best = what == "validation" and selector.is_better(result.metrics, selector.best_validation)
        self.metrics.log_evaluation(what, result, epoch, self.progress.global_step, best)
        self.figures.keep_evaluation(what, result, epoch, self.manifest.classes)

    def _promote_teacher(self) -> None:
        """End the epoch: the student becomes the teacher of the next one."""
        self.progress.epoch += 1
        self.progress.step = 0
        self.progress.pending_validation = True
        if self.teacher is not None:
            self.teacher.update(self.student)
            self.objective.reset_memory()
        check_identical("the ranking loss", self.objective.ranking)

    def _validate(self) -> None:
        """Validate the epoch that ended, and save."""
        best = self.model_selector.after_epoch(self.progress.epoch)
        self.progress.pending_validation = False
        self._save(best)
        if self.model_selector.out_of_patience(epoch := self.progress.epoch):
            patience = self.config.validation.patience
            logger.info(f"training ends after epoch {epoch}, since {patience} validations in a row found no better one")

    def _save(self, best: bool = False) -> None:
        self.save_requested = False
        self.checkpoints.save(best)

    def _finish(self) -> dict[str, Any]:
        """Evaluate the test set, once, and write the summary."""
        progress = self.progress
        rows = self.model_selector.after_training(progress.epoch, progress.step == 0, self.checkpoints.load_best)
        summary = {
            "meta": {
                "state": "finished",
                "name": self.config.name,
                "manifest": self.manifest.digest,
                "epochs": progress.epoch,
                "steps": progress.global_step,
                "world_size": self.runtime.world_size,
                "validation_classes": len(self.model_selector.classes),
                "best_validation": self.model_selector.best_validation,
                "tracked_run": self.metrics.tracker.run_id,
            },
            "rows": rows,
        }
        with raise_on_all_ranks("writing the results"):
            if self.run_dir is not None:
                tracker = self.metrics.tracker
                for path in (self.run_dir.write("summary.json", summary), *self.figures.draw()):
                    tracker.artifact(path)
                if self.config.tracking.log_model and (best := self.checkpoints.best_path()) is not None:
                    tracker.model(best)
                self.attempt.write_status("finished", f"{progress.epoch} epochs, {progress.global_step} steps")
        return summary

    def _preempted(self) -> dict[str, Any]:
        """Leave a run that the same command can continue."""
        self.metrics.preempted = True
        why = self.preemption.reason or "a request to another rank"
        message = f"stopped by {why} after {self.progress.global_step} steps; the same command goes on from there"
        if self.run_dir is not None:
            self.attempt.write_status("preempted", message)
        logger.info(message)
        return {"meta": {"state": "preempted", "message": message}, "rows": []}

    # ---- where it stands --------------------------------------------------------------------------------------------

    def _reached_max_steps(self) -> bool:
        limit = self.config.max_steps
        return limit is not None and self.progress.global_step >= limit

    def _is_complete(self) -> bool:
        progress = self.progress
        between_epochs = progress.step == 0 and not progress.pending_validation
        if between_epochs and self.model_selector.out_of_patience(progress.epoch):
            return True
        return progress.epoch == self.config.epochs or self._reached_max_steps()

    def _finished_before(self) -> dict[str, Any] | None:
        """The summary of a run that is already complete."""
        folder, summary = self.config.run_dir, None
        if self.runtime.is_main and self._is_complete() and read_status(folder).get("state") == "finished":
            summary = read_json(folder / "summary.json") or None
        summary = collectives.broadcast_object(summary)
        if summary is not None:
            logger.info("%s is finished already; --fresh trains it again under a new name", folder)
        return summary
