"""Balanced batches of any map-style dataset, by the shards' schedule."""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from dist_obdsd.data.manifest import Manifest, Shard
from dist_obdsd.data.schedule import EpochPlan, Sampling, plan_epoch
from dist_obdsd.distributed import collectives
from dist_obdsd.errors import InputError, require


class BalancedBatchSampler(Sampler[list[int]]):
    """Batches of K images of each class, the same on any number of ranks.

    >>> sampler = BalancedBatchSampler(dataset.targets, global_batch_size=8, samples_per_class=2)
    >>> loader = DataLoader(dataset, batch_sampler=sampler)
    >>> for epoch in range(2):
    ...     sampler.set_epoch(epoch)
    ...     for images, labels in loader:  # this rank's rows of the global batch
    ...         assert len(labels.unique()) == 4

    Unless drawn as released, no image stands in a batch twice and, while there are enough, no class. Every epoch is
    another one, and depends on the seed alone.
    """

    def __init__(
        self,
        labels: Sequence[Any] | np.ndarray,
        global_batch_size: int,
        samples_per_class: int = 2,
        *,
        seed: int = 0,
        sampling: Sampling = "epoch",
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        """
        Args:
            labels: the class of each image of the dataset [N], integers or names.
            global_batch_size: B, images in one step over all ranks; a multiple of the ranks and of K.
            samples_per_class: K, images of one class in a group.
            seed: the same on every rank.
            sampling: ``epoch``, each image at most once an epoch; or ``released``, classes, each as likely as any
                other, and images drawn with replacement.
            rank, world_size: this process's; None: those of the default process group.

        Raises:
            InputError: the sizes do not divide, there is no such sampling, or the data is too small for one batch.
        """
        self.rank = collectives.rank() if rank is None else rank
        self.world_size = collectives.world_size() if world_size is None else world_size
        B, W = global_batch_size, self.world_size
        require("rank", self.rank, 0 <= self.rank < W, f"from 0 to below the number of ranks, {W}")
        require("samples_per_class", samples_per_class, samples_per_class > 0, "at least 1")
        require("global_batch_size", B, B > 0 and B % W == 0, f"a multiple of the number of ranks, {W}")
        names, self.labels_N = np.unique(np.asarray(labels), return_inverse=True)
        if self.labels_N.ndim != 1 or not len(self.labels_N):
            raise InputError(f"the labels have shape {np.shape(labels)}; give one label for each image, (N,)")
        self.classes = names.tolist()
        """The labels' values; index of a class -> its label."""
        self._settings = {"seed": seed, "global_size": global_batch_size, "samples_per_class": samples_per_class}
        self._sampling: Sampling = sampling
        numbers = tuple(range(len(self.labels_N)))
        shard = Shard("", 0, "", numbers, tuple(self.labels_N.tolist()), ("train",) * len(numbers))
        self._manifest = Manifest({}, seed, samples_per_class, tuple(map(str, self.classes)), {"train": (shard,)})
        self.plan: EpochPlan
        """The epoch's global batches, with its coverage."""
        self.epoch, self.step = -1, 0
        self.set_epoch(0)

    def set_epoch(self, epoch: int, step: int = 0) -> None:
        """Choose the epoch of the next iteration, and the steps of it that are done."""
        if epoch != self.epoch:
            self.plan = plan_epoch(
                self._manifest, list(range(len(self.classes))), epoch=epoch, lanes=1, window=1,
                sampling=self._sampling, **self._settings,
            )  # fmt: skip
        require("step", step, 0 <= step <= self.plan.steps, f"from 0 to {self.plan.steps}, the steps of the epoch")
        self.epoch, self.step = epoch, step

    def __len__(self) -> int:
        """Steps of the epoch that are left, the same on every rank."""
        return self.plan.steps - self.step

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this rank's indices [b] of each step, until ``set_epoch`` is due."""
        b = self.plan.ids_SB.shape[1] // self.world_size
        for ids_B in self.plan.ids_SB[self.step :]:
            yield ids_B[self.rank * b : (self.rank + 1) * b].tolist()

    def state_dict(self, steps_done: int = 0) -> dict[str, int]:
        """Return the position after so many steps; a DataLoader's workers read ahead."""
        return {"epoch": self.epoch, "step": self.step + steps_done, "data": self._digest()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from a position, also with another number of ranks.

        Raises:
            InputError: it is of other labels, sizes or seed, whose batches are others.
        """
        if state["data"] != self._digest():
            raise InputError(
                "the sampler's state is of other labels, another batch size or seed; make the sampler as it was made "
                "before, or begin a new epoch with set_epoch"
            )
        self.set_epoch(state["epoch"], state["step"])

    def _digest(self) -> int:
        text = f"{self._settings} {self._sampling} ".encode() + self.labels_N.astype(np.int64).tobytes()
        return zlib.crc32(text)
