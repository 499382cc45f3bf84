"""Training, from a checked config to a summary. One process is one rank; every rank runs the same lines."""

import json
import time
from collections.abc import Iterable
from typing import Any

from dist_obdsd import checkpoint, machine
from dist_obdsd.config import Config
from dist_obdsd.data import manifest as manifests
from dist_obdsd.data.gpu import build_device_decoder
from dist_obdsd.data.schedule import lanes_of
from dist_obdsd.data.stream import TrainStream
from dist_obdsd.distributed import collectives
from dist_obdsd.distributed.collectives import assert_equal_across_ranks
from dist_obdsd.distributed.failures import assert_same_config, raise_on_all_ranks
from dist_obdsd.distributed.launch import Runtime
from dist_obdsd.errors import InputError, StoppedError
from dist_obdsd.evaluation.evaluator import EvaluationResult
from dist_obdsd.evaluation.splits import check_evaluable, validation_subset
from dist_obdsd.figures.run_figures import Album
from dist_obdsd.losses.obdsd import build_objective
from dist_obdsd.manifold.targets import describe
from dist_obdsd.models.embedder import build_embedder
from dist_obdsd.models.precision import check_precision, compile_networks
from dist_obdsd.models.teacher import ProgressiveTeacher, check_identical
from dist_obdsd.tracking.provenance import flatten
from dist_obdsd.training import failures as failure
from dist_obdsd.training.checkpoint_manager import Saver
from dist_obdsd.training.ddp import build_strategy
from dist_obdsd.training.metrics_logger import MetricsLogger, begin_tracking
from dist_obdsd.training.model_selection import ModelSelector
from dist_obdsd.training.preemption import PreemptionHandler
from dist_obdsd.training.run_dir import RunDir
from dist_obdsd.training.snapshot import RunState
from dist_obdsd.training.terminal import Terminal
from dist_obdsd.training.train_step import DelayedMetrics, TrainProgress, TrainStep


class Trainer:
    """One run on one rank. ``run`` does everything."""

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        stop: PreemptionHandler,
        terminal: Terminal,
    ) -> None:
        """Check and build everything that a first step needs. Collective.

        Args:
            stop: on duty already.
            terminal: shows what this rank is to show.

        Raises:
            InputError: on every rank, when data, weights or run folder do not fit.
        """
        self.config, self.runtime, self.stop, self.terminal = config, runtime, stop, terminal
        self.say = say = terminal.say
        if runtime.device.type == "cpu":
            machine.tune_malloc()
        assert_same_config(flatten(config.model_dump(mode="json")))
        with raise_on_all_ranks("reading the shards"):
            self.manifest = manifests.load(config.data.shards)
            self.train_classes, self.validation_classes = manifests.split_classes(
                self.manifest, config.validation, config.seed
            )
            check_evaluable(self.manifest, config, validation_subset(self.manifest, self.validation_classes, config))
            lanes_of(runtime.rank, runtime.world_size, config.data.lanes)
        assert_equal_across_ranks(f"the manifest of {config.data.shards}", self.manifest.digest, InputError)
        with raise_on_all_ranks("building the network"):
            check_precision(config, runtime.device)
            self.student = build_embedder(config, runtime.device, say, runtime.world_size)
            self.objective = build_objective(config, self.train_classes, runtime.device)
            for line in describe(config, runtime.world_size):
                say(line)
        self.device_decoder = build_device_decoder(config, runtime.device, say, terminal.warn)
        self.teacher = ProgressiveTeacher(self.student) if config.distillation.needs_teacher else None
        compile_networks(config, runtime, self.student, self.teacher, say)
        own = list(self.objective.ranking.named_parameters())
        self.strategy = build_strategy(self.student, config, runtime, own)
        self.step = TrainStep(config, runtime, self.strategy, self.teacher, self.objective, self.train_classes)
        self.reader = DelayedMetrics(lag=0 if config.debug else 1 if runtime.device.type == "cpu" else 8)
        self.position = TrainProgress()
        self.pending_validation = False  # the epoch before the position is trained and not yet measured
        self.run_id: str | None = None
        self.wanted = {"stop": False, "save": False}  # by any rank
        self.run_dir: RunDir | None = None
        with raise_on_all_ranks("opening the run folder"):
            if runtime.is_main:
                self.run_dir = RunDir(config.run_dir)
        self.record = MetricsLogger(config, self.run_dir, terminal, runtime.launch.local_rank == 0)
        self.album = Album(self.run_dir.path if self.run_dir and config.tracking.figures else None, say)
        self.checkpoints = config.run_dir / "checkpoints"
        self.saver = Saver(config.checkpoint, self.checkpoints, self._saved)
        self.judge = ModelSelector(
            config, self.manifest, self.validation_classes, self.student, runtime, self._measured, stop
        )
        self.snapshot = RunState(
            config, self.manifest.digest, self.validation_classes, self.student, self.teacher, self.objective,
            self.strategy, self.judge,
        )  # fmt: skip

    # ---- the run ----------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train, evaluate, record. Collective.

        Returns:
            The summary, the same on every rank. Its ``meta.state`` is finished, or preempted when a signal ended the
            run early.
        """
        try:
            with failure.report_failure(self.config, self.runtime.rank, lambda: self.position.global_step):
                self._resume()
                if (summary := self._finished_before()) is not None:
                    return summary
                with raise_on_all_ranks("preparing the run folder"):
                    if self.run_dir is not None:
                        self.run_dir.write_status("running", "")
                        self.run_dir.cut_metrics(self.position.global_step)
                return self._tracked()
        finally:
            self.saver.close()
            if self.run_dir is not None:
                self.run_dir.close()

    def _tracked(self) -> dict[str, Any]:
        """Run inside a tracked run that ends with a truthful status."""
        self.record.tracker = tracker = begin_tracking(
            self.config, self.run_dir, self.manifest, self.runtime, self.run_id, self.terminal.tell
        )
        status = "FAILED"
        try:
            summary = self._run()
            status = "FINISHED" if summary["meta"]["state"] == "finished" else "KILLED"
            return summary
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            tracker.close(status)

    def _run(self) -> dict[str, Any]:
        try:
            with raise_on_all_ranks("starting"):
                self.stop.check()
            if self.position.global_step == 0:
                self.judge.before_training()
            if self.pending_validation:
                self._validate_epoch()
            if self._train():
                return self._preempted(save=True)
        except StoppedError:
            return self._preempted(save=True)
        try:
            return self._finish()
        except StoppedError:  # the last checkpoint has everything, and the student may hold the best epoch's weights
            return self._preempted(save=False)

    def _train(self) -> bool:
        """All epochs from the position on. True when a signal stopped it inside one.

        Raises:
            StoppedError: on every rank, when a signal stopped a measurement after one.
        """
        if self.position.epoch == self.config.epochs or self._reached_max_steps():
            return False
        with raise_on_all_ranks("opening the stream"):
            stream = TrainStream(
                self.manifest,
                self.train_classes,
                self.config,
                self.runtime.rank,
                self.runtime.world_size,
                self.position.epoch,
                self.position.step,
                self.terminal.warn,
                pinned=self.runtime.device.type == "cuda",
                device_decoder=self.device_decoder,
            )
        try:
            while self.position.epoch < self.config.epochs and not self._reached_max_steps():
                steps = stream.plan(self.position.epoch).steps
                if self._train_epoch(stream):
                    return True
                self.strategy.sync_buffers()
                if self.position.step < steps:  # max_steps ends the run inside an epoch
                    self._save(best=False)
                else:
                    self._finish_epoch()
        finally:
            stream.close()
        return False

    def _train_epoch(self, stream: TrainStream) -> bool:
        """The rest of the epoch at the current position. True when a signal stopped it."""
        config, position = self.config, self.position
        plan, epoch = stream.plan(position.epoch), position.epoch
        title = f"epoch {epoch + 1}/{config.epochs}"
        repeated = f", {plan.repeated} class repetitions" if plan.repeated else ""
        self.say(f"{title}: {plan.steps} steps, {plan.coverage:.1%} of the reachable images{repeated}")
        self.strategy.network.train()
        left = (config.epochs - epoch) * plan.steps - position.step
        if config.max_steps is not None:
            left = min(left, config.max_steps - position.global_step)
        self.terminal.begin(title, position.step, plan.steps, left)
        started, waited, steps = time.perf_counter(), 0.0, 0
        while position.step < plan.steps and not self._reached_max_steps():
            before = time.perf_counter()
            batch = next(stream)
            wait = time.perf_counter() - before
            progress = position.step / plan.steps
            names, numbers = self.step(batch, position, progress, self.stop.requested, self._overdue())
            about: dict[str, float] = {
                "step": position.global_step,
                "epoch": epoch,
                "ramp": self.step.objective.ramp(epoch, config.epochs),
                "data_wait": wait,
            }
            about["seconds"] = time.perf_counter() - before
            position.step += 1
            position.global_step += 1
            waited += wait
            steps += 1
            self._read(self.reader.push(about, names, numbers))
            self.record.usage(position.global_step, last=position.step == plan.steps)
            if self.wanted["stop"]:
                break
            if (self.wanted["save"] or self.saver.due(position.global_step)) and position.step < plan.steps:
                self._read(self.reader.drain())  # what is recorded must reach as far as what is saved
                self._save(best=False)
        self._read(self.reader.drain())
        self.terminal.end()
        if steps:
            self.album.keep_batch(self.step.latest, epoch)
            images, seconds = steps * config.batch.global_size, time.perf_counter() - started
            self.record.epoch(title, epoch, position.global_step, images, seconds, waited)
        return self.wanted["stop"]

    def _overdue(self) -> bool:
        return self.run_dir is not None and self.saver.overdue()

    def _read(self, steps: Iterable[tuple[dict[str, float], dict[str, float]]]) -> None:
        """Record the steps whose numbers have arrived, and what any rank wished in them."""
        for about, numbers in steps:
            for wish in self.wanted:
                self.wanted[wish] |= numbers[wish] > 0
            self.record.step(about, numbers)

    def _measured(self, what: str, result: EvaluationResult, epoch: int) -> None:
        self.record.measured(what, result, epoch, self.position.global_step)
        self.album.keep_evaluation(what, result, epoch, self.manifest.classes)

    def _finish_epoch(self) -> None:
        """Promote the teacher, measure and save."""
        self.position.epoch += 1
        self.position.step = 0
        if self.teacher is not None:
            self.teacher.promote(self.student, self.position.epoch)
            self.objective.forget()
        check_identical("the ranking loss", self.objective.ranking)
        self._validate_epoch()

    def _validate_epoch(self) -> None:
        self.pending_validation = True
        best = self.judge.after_epoch(self.position.epoch)
        self.pending_validation = False
        self._save(best)

    def _finish(self) -> dict[str, Any]:
        """Look at the test set, once, and write the summary."""
        with raise_on_all_ranks("saving the checkpoint"):
            self.saver.wait()
        self.record.cost_of_saving()
        rows = self.judge.after_training(self.position.epoch, self.position.step == 0, self._load_best)
        summary = {
            "meta": {
                "state": "finished",
                "name": self.config.name,
                "manifest": self.manifest.digest,
                "epochs": self.position.epoch,
                "steps": self.position.global_step,
                "world_size": self.runtime.world_size,
                "validation_classes": len(self.judge.classes),
                "best_validation": self.judge.best_validation,
                "tracked_run": self._tracked_run(),
            },
            "rows": rows,
        }
        if self.run_dir is not None:
            self.record.tracker.artifact(self.run_dir.write_text("summary.json", json.dumps(summary, indent=1) + "\n"))
        with raise_on_all_ranks("drawing the figures"):
            for path in self.album.draw():
                self.record.tracker.artifact(path)
        if self.run_dir is not None:
            found = checkpoint.find(self.checkpoints, "best") or checkpoint.find(self.checkpoints)
            if self.config.tracking.log_model and found is not None:
                self.record.tracker.model(found)
            self.run_dir.write_status("finished", f"{self.position.epoch} epochs, {self.position.global_step} steps")
        return summary

    def _preempted(self, save: bool) -> dict[str, Any]:
        if save:
            self.strategy.sync_buffers()
            self._save(best=False)
        with raise_on_all_ranks("saving the checkpoint"):
            self.saver.wait()
        message = f"stopped by a signal after {self.position.global_step} steps; the same command goes on from there"
        if self.run_dir is not None:
            self.run_dir.write_status("preempted", message)
        asked = collectives.gather_json(self.stop.seconds_ago)
        self.say(f"{message} ({max(filter(None, asked), default=0.0):.1f} s after the signal)")
        return {"meta": {"state": "preempted", "message": message}, "rows": []}

    def _load_best(self) -> None:
        """Put the weights of the best epoch by validation into the student. Collective."""
        with raise_on_all_ranks("reading the best checkpoint"):
            if self.run_dir is not None:
                self.student.load_state_dict(checkpoint.load(self.checkpoints / "best")["student"])
        # Other nodes may not see rank 0's folder.
        collectives.broadcast_(list(self.student.state_dict().values()))

    def _reached_max_steps(self) -> bool:
        limit = self.config.max_steps
        return limit is not None and self.position.global_step >= limit

    # ---- state ------------------------------------------------------------------------------------------------------

    def _save(self, best: bool) -> None:
        self.wanted["save"] = False
        started = time.perf_counter()
        state = self.snapshot.take(self.position, self.pending_validation, self._tracked_run())
        with raise_on_all_ranks("saving the checkpoint"):
            if self.run_dir is not None:
                self.saver.save(state, best)
        self.record.saved(time.perf_counter() - started)

    def _tracked_run(self) -> str | None:
        """The tracker learns its run's id at some time, or never; a run that is not tracked keeps what it was told."""
        return self.record.tracker.run_id or self.run_id

    def _saved(self, name: str, size: int, seconds: float) -> None:
        self.say(f"saved {name}: {size / 2**20:.1f} MiB, training waited {seconds:.2f} s for it")
        values = {"mib": size / 2**20, "seconds": seconds}
        self.record.values("checkpoint", values, self.position.epoch, self.position.global_step)
        # A tracking server is no place for files of this size, so it learns where they are.
        self.record.tracker.tags(checkpoint.pointers(self.checkpoints))

    def _resume(self) -> None:
        """Continue from the run folder's last checkpoint, if it has one. Rank 0 decides which. Collective."""
        folder = self.checkpoints
        found = None
        with raise_on_all_ranks("finding the last checkpoint"):
            if self.run_dir is not None:
                found = checkpoint.find(folder)
        name = collectives.broadcast_object(found.name if found else None)
        if name is None:
            return
        with raise_on_all_ranks("resuming"):
            state = checkpoint.load(folder / name)
            self.position, self.pending_validation, self.run_id = self.snapshot.put_back(state)
        if self.teacher is not None:
            self.teacher.load(state["teacher"])
        self.say(f"resuming {self.config.run_dir} from {name}: {self.position.global_step} steps are done")

    def _finished_before(self) -> dict[str, Any] | None:
        """The summary of a run that is already complete."""
        summary = None
        done = self.position.epoch == self.config.epochs or self._reached_max_steps()
        if done and self.run_dir is not None and self.run_dir.status().get("state") == "finished":
            summary = json.loads((self.run_dir.path / "summary.json").read_text())
        summary = collectives.broadcast_object(summary)
        if summary is not None:
            self.say(f"{self.config.run_dir} is finished already; --fresh trains it again under a new name")
        return summary
