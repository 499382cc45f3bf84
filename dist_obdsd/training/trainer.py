"""Training, from a checked config to a summary. One process is one rank; every rank runs the same lines."""

import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from dist_obdsd import collectives
from dist_obdsd.config import Config, changed_settings
from dist_obdsd.data import manifest as manifests
from dist_obdsd.data.schedule import lanes_of
from dist_obdsd.data.stream import TrainStream
from dist_obdsd.errors import InputError, RunError, sentence
from dist_obdsd.evaluation.evaluator import EvaluationResult
from dist_obdsd.evaluation.protocols import check_evaluable, validation_subset
from dist_obdsd.model.embedder import build_embedder
from dist_obdsd.model.teacher import ProgressiveTeacher, check_identical
from dist_obdsd.objective.manifold import choose_solver
from dist_obdsd.objective.objective import build_objective
from dist_obdsd.runtime import Runtime
from dist_obdsd.tracking import provenance
from dist_obdsd.tracking.tracker import Tracker, build_tracker
from dist_obdsd.training import checkpoint
from dist_obdsd.training.judge import Judge
from dist_obdsd.training.optim import load_state_by_name, state_by_name
from dist_obdsd.training.rundir import RunDir, read_status, write_status
from dist_obdsd.training.step import Position, StepReader, TrainStep
from dist_obdsd.training.strategy import DDPStrategy


class Trainer:
    """One run on one rank. ``run`` does everything."""

    def __init__(
        self, settings: Config, runtime: Runtime, say: Callable[[str], None], warn: Callable[[str], None]
    ) -> None:
        """Check and build everything that a first step needs. Collective.

        Args:
            say: prints what all ranks know; does nothing on ranks that are not to speak.
            warn: prints what this rank alone has met.

        Raises:
            InputError: on every rank, when data, weights or run folder do not fit.
        """
        self.settings, self.runtime, self.say, self.warn = settings, runtime, say, warn
        collectives.agree_same("the config", settings.digest())
        with collectives.agree("reading the shards"):
            self.manifest = manifests.load(settings.data.shards)
            self.train_classes, self.validation_classes = manifests.split_classes(
                self.manifest, settings.validation, settings.seed
            )
            check_evaluable(
                self.manifest, settings, validation_subset(self.manifest, self.validation_classes, settings)
            )
            lanes_of(runtime.rank, runtime.world_size, settings.data.lanes)
        collectives.agree_same("the manifest", self.manifest.digest)
        with collectives.agree("building the network"):
            self.student = build_embedder(settings, runtime.device, say, runtime.world_size)
            self.objective = build_objective(settings, self.train_classes, runtime.device)
            self._check_objective()
        self.teacher = ProgressiveTeacher(self.student) if settings.distillation.needs_teacher else None
        self.judge = Judge(settings, self.manifest, self.validation_classes, self.student, runtime, self._measured)
        own = list(self.objective.ranking.named_parameters())
        self.strategy = DDPStrategy(self.student, settings, runtime, own)
        self.step = TrainStep(settings, runtime, self.strategy, self.teacher, self.objective, self.train_classes)
        self.reader = StepReader(lag=0 if settings.debug else 1 if runtime.device.type == "cpu" else 8)
        self.checkpoints = settings.run_dir / "checkpoints"
        self.position = Position()
        self.run_id: str | None = None
        self.tracker = Tracker()
        self.stop_requested = False  # of this rank
        self.stop_requested_anywhere = False
        self.nonfinite_in_a_row = 0
        self.defective_steps = 0
        self.run_dir: RunDir | None = None
        with collectives.agree("opening the run folder"):
            if runtime.is_main:
                self.run_dir = RunDir(settings.run_dir)

    def _check_objective(self) -> None:
        """Say once what depends on sizes, before anything runs."""
        settings, W = self.settings, self.runtime.world_size
        B, distillation = settings.batch.global_size, settings.distillation
        if distillation.scope == "rank" and W > 1:
            self.say(f"distillation.scope=rank: {W} manifolds of {B // W} images, so results depend on the ranks")
        if distillation.diffuses:
            nodes = (B // W if distillation.scope == "rank" else B) + distillation.memory
            solver = choose_solver(nodes, B // W, distillation, 8 if settings.precision == "float64" else 4)
            self.say(f"diffusion over {nodes} images for {B // W} rows a rank: {solver}")

    # ---- the run ----------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train, evaluate, record. Collective.

        Returns:
            The summary, the same on every rank. Its ``meta.state`` is finished, or preempted when a signal ended the
            run early.
        """
        try:
            self._resume()
            if (summary := self._finished_before()) is not None:
                return summary
            with collectives.agree("preparing the run folder"):
                if self.run_dir is not None:
                    self.run_dir.write_status("running", "")
                    self.run_dir.cut_metrics(self.position.global_step)
            with self._signals():
                return self._tracked()
        except BaseException as error:  # Ctrl-C as well
            # The first rank to fail has the cause; the others only notice that it is gone.
            if read_status(self.settings.run_dir).get("state") == "running":
                with contextlib.suppress(RunError):  # a full disk must not hide what went wrong before
                    write_status(self.settings.run_dir, "failed", f"rank {self.runtime.rank}: {sentence(error)}")
            raise
        finally:
            if self.run_dir is not None:
                self.run_dir.close()

    def _tracked(self) -> dict[str, Any]:
        """Run inside a tracked run that ends with a truthful status."""
        tags = {
            "launcher": self.runtime.launch.launcher,
            "world_size": str(self.runtime.world_size),
            "manifest": self.manifest.digest,
            "git_commit": provenance.git_commit(),
        }
        versions = provenance.versions()
        name, resumed = self.settings.name, self.run_id
        self.tracker = build_tracker(self.settings.tracking, name, resumed, tags, self.runtime.is_main, self.say)
        self.run_id = self.tracker.run_id or resumed
        if self.run_dir is not None:
            path = self.run_dir.write_text("config.yaml", self.settings.to_yaml())
            self.run_dir.write_text("provenance.json", json.dumps(tags | versions, indent=1) + "\n")
            if resumed is None:
                self.tracker.params(provenance.flatten(self.settings.model_dump(mode="json")) | versions)
                self.tracker.artifact(path)
        status = "FAILED"
        try:
            summary = self._run()
            status = "FINISHED" if summary["meta"]["state"] == "finished" else "KILLED"
            return summary
        finally:
            self.tracker.close(status)

    def _run(self) -> dict[str, Any]:
        if self.position.global_step == 0:
            self.judge.before_training()
        with collectives.agree("opening the stream"):
            stream = TrainStream(
                self.manifest,
                self.train_classes,
                self.settings,
                self.runtime.rank,
                self.runtime.world_size,
                self.position.epoch,
                self.position.step,
                self.warn,
            )
        try:
            while self.position.epoch < self.settings.epochs and not self._reached_max_steps():
                steps = stream.plan(self.position.epoch).steps
                if self._train_epoch(stream):
                    return self._preempted()
                self.strategy.sync_buffers()
                if self.position.step < steps:  # max_steps ends the run inside an epoch
                    self._save(best=False)
                else:
                    self._finish_epoch()
        finally:
            stream.close()
        return self._finish()

    def _train_epoch(self, stream: TrainStream) -> bool:
        """The rest of the epoch at the current position. True when a signal stopped it."""
        settings, position = self.settings, self.position
        plan, epoch = stream.plan(position.epoch), position.epoch
        title = f"epoch {epoch + 1}/{settings.epochs}"
        repeated = f", {plan.repeated} class repetitions" if plan.repeated else ""
        self.say(f"{title}: {plan.steps} steps, {plan.coverage:.1%} of the reachable images{repeated}")
        self.strategy.network.train()
        started, waited, steps = time.perf_counter(), 0.0, 0
        while position.step < plan.steps and not self._reached_max_steps():
            before = time.perf_counter()
            batch = next(stream)
            wait = time.perf_counter() - before
            names, numbers = self.step(batch, position, position.step / plan.steps, self.stop_requested)
            about: dict[str, float] = {
                "step": position.global_step,
                "epoch": epoch,
                "ramp": self.step.objective.ramp(epoch, settings.epochs),
                "data_wait": wait,
            }
            about["seconds"] = time.perf_counter() - before
            position.step += 1
            position.global_step += 1
            waited += wait
            steps += 1
            if self._read(self.reader.push(about, names, numbers)):
                break
        if self._read(self.reader.drain()):
            return True
        if steps:
            seconds = time.perf_counter() - started
            rate = steps * settings.batch.global_size / seconds
            self._record(
                "epoch", {"seconds": seconds, "images_per_s": rate, "data_wait_share": waited / seconds}, epoch=epoch
            )
            self.say(f"{title}: {seconds:.1f} s, {rate:.0f} images/s, {waited / seconds:.1%} waiting for data")
        return self.stop_requested_anywhere

    def _read(self, steps: Iterable[tuple[dict[str, float], dict[str, float]]]) -> bool:
        """Record the steps whose numbers have arrived. True when any rank was asked to stop.

        Raises:
            RunError: on every rank alike, after too many non-finite steps in a row.
        """
        for about, numbers in steps:
            self.stop_requested_anywhere |= numbers.pop("stop") > 0
            step = int(about.pop("step"))
            values = {name: value for name, value in numbers.items() if abs(value) < float("inf")}
            complaint = None
            if numbers["masked"]:
                self.nonfinite_in_a_row += 1
                complaint = "the loss or its gradient is not finite, so the step was left out"
            else:
                self.nonfinite_in_a_row = 0
                if numbers.get("target_defects", 0) > 0:
                    self.defective_steps += 1
                    share = numbers["target_defects"]
                    complaint = f"{share:.1%} of the target's rows are no distribution (step {self.defective_steps} so)"
            if complaint is not None:
                self.say(f"step {step}: {complaint}")
            if self.run_dir is not None:
                self.run_dir.log("step", step, about | values)
            self.tracker.metrics(about | values, step)
            if step % self.settings.tracking.every_steps == 0:
                losses = "  ".join(f"{k} {v:.4f}" for k, v in values.items() if k in ("ranking", "distillation"))
                self.say(f"  step {step}: {losses}")
            if complaint is not None and self.settings.debug:
                raise RunError(f"step {step}: {complaint}; debug=true stops here, debug=false goes on")
            if self.nonfinite_in_a_row >= self.settings.max_nonfinite_steps:
                raise RunError(
                    f"{self.nonfinite_in_a_row} steps in a row up to step {step} had a NaN or infinite loss or "
                    f"gradient; lower optim.lr or set optim.clip_norm, under another name"
                )
        return self.stop_requested_anywhere

    def _finish_epoch(self) -> None:
        """Promote the teacher, validate and save."""
        self.position.epoch += 1
        self.position.step = 0
        if self.teacher is not None:
            self.teacher.promote(self.student, self.position.epoch)
            self.objective.forget()
        check_identical("the ranking loss", self.objective.ranking)
        self._save(best=self.judge.after_epoch(self.position.epoch))

    def _finish(self) -> dict[str, Any]:
        """Look at the test set, once, and write the summary."""
        rows = self.judge.after_training(self.position.epoch, self.position.step == 0, self._load_best)
        summary = {
            "meta": {
                "state": "finished",
                "name": self.settings.name,
                "manifest": self.manifest.digest,
                "epochs": self.position.epoch,
                "steps": self.position.global_step,
                "world_size": self.runtime.world_size,
                "validation_classes": len(self.judge.classes),
                "best_validation": self.judge.best_validation,
                "tracked_run": self.run_id,
            },
            "rows": rows,
        }
        if self.run_dir is not None:
            self.tracker.artifact(self.run_dir.write_text("summary.json", json.dumps(summary, indent=1) + "\n"))
            self.run_dir.write_status("finished", f"{self.position.epoch} epochs, {self.position.global_step} steps")
        return summary

    def _preempted(self) -> dict[str, Any]:
        self.strategy.sync_buffers()
        self._save(best=False)
        message = f"stopped by a signal after {self.position.global_step} steps; the same command goes on from there"
        if self.run_dir is not None:
            self.run_dir.write_status("preempted", message)
        self.say(message)
        return {"meta": {"state": "preempted", "message": message}, "rows": []}

    def _load_best(self) -> None:
        """Put the weights of the best epoch by validation into the student. Collective."""
        with collectives.agree("reading the best checkpoint"):
            if self.run_dir is not None:
                self.student.load_state_dict(checkpoint.load(self.checkpoints / "best")["student"])
        # Other nodes may not see rank 0's folder.
        collectives.broadcast_(list(self.student.state_dict().values()))

    def _reached_max_steps(self) -> bool:
        limit = self.settings.max_steps
        return limit is not None and self.position.global_step >= limit

    # ---- evaluation and records -------------------------------------------------------------------------------------

    def _measured(self, what: str, result: EvaluationResult, epoch: int) -> None:
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
        alone = f", {result.excluded} without a match left out" if result.excluded else ""
        self.say(f"{what}: {numbers}  ({result.queries} queries{alone}, {result.seconds:.1f} s)")
        self._record(what, result.metrics, epoch=epoch)

    def _record(self, kind: str, values: dict[str, float], epoch: int) -> None:
        if self.run_dir is not None:
            self.run_dir.log(kind, self.position.global_step, {"epoch": epoch, **values})
        self.tracker.metrics({f"{kind}/{name}": value for name, value in values.items()}, self.position.global_step)

    # ---- state ------------------------------------------------------------------------------------------------------

    def _save(self, best: bool) -> None:
        with collectives.agree("saving the checkpoint"):
            if self.run_dir is not None:
                state = {
                    "config": self.settings.model_dump(mode="json"),
                    "manifest": self.manifest.digest,
                    "validation_classes": self.validation_classes,
                    "student": self.student.state_dict(),
                    "teacher": self.teacher.state() if self.teacher is not None else None,
                    "optimizer": state_by_name(self.strategy.optimizer, self.strategy.parameters),
                    **self.objective.state(),
                    "objective_optimizer": state_by_name(
                        self.strategy.objective_optimizer, self.strategy.objective_parameters
                    ),
                    "scaler": None,
                    "position": vars(self.position).copy(),
                    "tracker": self.run_id,
                    **self.judge.state(),
                }
                keep = self.settings.checkpoint.keep
                checkpoint.save(self.checkpoints, state, best=best, keep=keep)

    def _resume(self) -> None:
        """Continue from the run folder's last checkpoint, if it has one. Rank 0 decides which. Collective."""
        folder = self.checkpoints
        found = None
        with collectives.agree("finding the last checkpoint"):
            if self.run_dir is not None:
                found = checkpoint.find(folder)
        name = collectives.from_main(found.name if found else None)
        if name is None:
            return
        with collectives.agree("resuming"):
            state = checkpoint.load(folder / name)
            changes = changed_settings(state["config"], self.settings.model_dump(mode="json"))
            if changes:
                raise InputError(
                    f"{self.settings.run_dir} was started with other settings ({'; '.join(changes)}); "
                    f"use those, set another name, or start with --fresh"
                )
            if state["manifest"] != self.manifest.digest:
                raise InputError(
                    f"{self.settings.run_dir} was trained on shards with manifest {state['manifest'][:12]} but "
                    f"{self.settings.data.shards} has {self.manifest.digest[:12]}; point data.shards to the same shards"
                )
            self.student.load_state_dict(state["student"])
            load_state_by_name(self.strategy.optimizer, self.strategy.parameters, state["optimizer"])
            self.objective.load(state, self.runtime.device)
            load_state_by_name(
                self.strategy.objective_optimizer, self.strategy.objective_parameters, state["objective_optimizer"]
            )
            self.position = Position(**state["position"])
            self.judge.load(state)
            self.run_id = state["tracker"]
        if self.teacher is not None:
            self.teacher.load(state["teacher"])
        self.say(f"resuming {self.settings.run_dir} from {name}: {self.position.global_step} steps are done")

    def _finished_before(self) -> dict[str, Any] | None:
        """The summary of a run that is already complete."""
        summary = None
        done = self.position.epoch == self.settings.epochs or self._reached_max_steps()
        if done and self.run_dir is not None and self.run_dir.status().get("state") == "finished":
            summary = json.loads((self.run_dir.path / "summary.json").read_text())
        summary = collectives.from_main(summary)
        if summary is not None:
            self.say(f"{self.settings.run_dir} is finished already; --fresh trains it again under a new name")
        return summary

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGUSR1 ask for a stop; the step's all-reduce tells the other ranks."""

        def ask(number: int, frame: Any) -> None:
            self.stop_requested = True

        previous = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
