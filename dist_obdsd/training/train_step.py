"""One optimizer step over all ranks, and how its numbers reach the host.

Legend: b rows of this rank, B rows of the global batch, D embedding dimension.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dist_obdsd.config import Config
from dist_obdsd.data.stream import TrainBatch
from dist_obdsd.distributed.launch import Runtime
from dist_obdsd.errors import RunError
from dist_obdsd.figures.run_figures import BatchSample
from dist_obdsd.losses.obdsd import OBDSDLoss, class_indices, is_ranking
from dist_obdsd.models.precision import autocast
from dist_obdsd.models.teacher import ProgressiveTeacher
from dist_obdsd.rng import derive
from dist_obdsd.training.optimizers import learning_rate
from dist_obdsd.training.strategy import Strategy
from dist_obdsd.transfer import AsyncHostCopy, DeviceUploader


@dataclass
class TrainProgress:
    """The next step: ``step`` of ``epoch``; ``global_step`` counts over the run."""

    epoch: int = 0
    step: int = 0
    global_step: int = 0
    pending_validation: bool = False
    """True while the epoch before it is trained but not validated."""

    def state_dict(self) -> dict[str, Any]:
        position = {"epoch": self.epoch, "step": self.step, "global_step": self.global_step}
        return {"position": position, "pending_validation": self.pending_validation}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state["position"], pending_validation=state["pending_validation"])


Numbers = dict[str, float]


class DelayedMetrics:
    """Hands the host a step's numbers ``lag`` steps later, so no GPU waits for it."""

    def __init__(self, lag: int) -> None:
        self._lag = lag
        self._waiting: deque[tuple[Numbers, list[str], AsyncHostCopy]] = deque()

    def push(self, host: Numbers, names: list[str], numbers_n: torch.Tensor) -> Iterator[tuple[Numbers, Numbers]]:
        """Queue a step's facts and numbers; yield the steps that are old enough."""
        self._waiting.append((host, names, AsyncHostCopy(numbers_n)))
        return self.drain(self._lag)

    def drain(self, left: int = 0) -> Iterator[tuple[Numbers, Numbers]]:
        """Yield the steps that wait, but for the ``left`` youngest."""
        while len(self._waiting) > left:
            host, names, numbers = self._waiting.popleft()
            yield host, dict(zip(names, numbers.read(), strict=True))


class TrainStep:
    """One optimizer step of student, teacher and objective over all ranks."""

    def __init__(
        self, config: Config, runtime: Runtime, strategy: Strategy, teacher: ProgressiveTeacher | None,
        objective: OBDSDLoss, classes: Sequence[int],
    ) -> None:  # fmt: skip
        """Take the parts; ``classes`` are the training classes, sorted."""
        self.config, self.runtime, self.strategy = config, runtime, strategy
        self.teacher, self.objective, self.classes_C = teacher, objective, torch.as_tensor(classes)
        self.upload = DeviceUploader(runtime.device)
        self.early_diffusion: bool | None = None
        """As of ``OBDSDLoss.start_teacher``."""
        self.latest: BatchSample | None = None
        """The batch of the latest step, the same on every rank."""

    def __call__(
        self, batch: TrainBatch, progress: TrainProgress, epoch_share: float, stop: bool = False, save: bool = False
    ) -> tuple[list[str], torch.Tensor]:
        """Take one step. Collective.

        Args:
            epoch_share: share of the epoch's steps that are done.
            stop, save: whether this rank was asked to stop, or wants a checkpoint; any rank's request reaches all.

        Returns:
            Names, and the [n] numbers that they name, still on the device; ``anchors`` is the count behind the
            mean of the ranking loss's first part.
        """
        if (batch.epoch, batch.step) != (progress.epoch, progress.step):
            raise RunError(f"the stream gave step {batch.step} of epoch {batch.epoch} at {progress}; this is a defect")
        ramp = progress.epoch / self.config.epochs
        images_b = self.upload(batch.images_b)
        labels_B = self.upload(class_indices(batch.labels_B, self.classes_C))
        teacher = None
        # The teacher comes first: its rows travel while the student's forward pass runs.
        if self.teacher is not None and self.objective.needs_teacher(ramp):
            with autocast(self.config, self.runtime.device, teacher=True):
                chunks = images_b.split(self.config.batch.chunk or len(images_b))
                T_bD = torch.cat([self.teacher(images) for images in chunks])
            teacher = self.objective.start_teacher(T_bD, self.early_diffusion)
        seed = derive(self.config.seed, "ranking", progress.epoch, progress.step)
        out = self.objective(
            self.strategy.embed(images_b), labels_B, teacher, ramp=ramp, seed=seed, also_sum=(stop, save)
        )
        rows_BD = out.student_BD if out.teacher_BD is None else out.teacher_BD
        self.latest = BatchSample(rows_BD, batch.labels_B, "student" if out.teacher_BD is None else "teacher")

        optim = self.config.optim
        rate = learning_rate(optim, progress.epoch, self.config.epochs, epoch_share, progress.global_step)
        outcome = self.strategy.step(out.loss, out.nonfinite, rate)
        names = [*out.names, "grad_norm", "masked", "stop_requested", "save_requested", "lr", "anchors"]
        rate_1 = out.means_n.new_full((1,), rate)
        numbers = torch.cat([out.means_n, outcome, out.summed, rate_1, out.counts_n[:1]])
        if "ranking" in names:
            return names, numbers
        whole = out.means_n[: sum(is_ranking(name) for name in names)].sum(0, keepdim=True)
        return ["ranking", *names], torch.cat([whole, numbers])
