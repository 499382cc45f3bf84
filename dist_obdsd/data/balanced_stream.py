"""Balanced batches of packed shards for anybody's training loop."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from dist_obdsd.config import parse_config
from dist_obdsd.data import manifest as manifests
from dist_obdsd.data.stream import TrainStream
from dist_obdsd.distributed import collectives
from dist_obdsd.errors import InputError, require


class Batch(NamedTuple):
    """This rank's rows of one global batch."""

    images_b: torch.Tensor
    """uint8 [b, C, H, W], on the CPU."""
    labels_b: torch.Tensor
    """int64 [b], from 0 to ``num_classes`` - 1."""


class BalancedStream:
    """Batches of K images of each class from shards of ``dist-obdsd pack``.

    >>> stream = BalancedStream("data/badges", global_batch_size=16, image_size=16, lanes=4)
    >>> for epoch in range(2):
    ...     for images, labels in stream:  # one epoch; the next loop is the next one
    ...         assert images.shape == (16, 3, 16, 16)
    >>> stream.close()

    Each rank reads its own shards, and decoding runs ahead, over the end of an epoch, too. The global batches do not
    depend on the number of ranks and workers.
    """

    def __init__(
        self,
        shards: str,
        *,
        global_batch_size: int,
        samples_per_class: int = 2,
        transform: str = "crop",
        seed: int = 0,
        num_workers: int = 4,
        rank: int | None = None,
        world_size: int | None = None,
        **data: Any,
    ) -> None:
        """
        Args:
            shards: a folder, a URL or a ``pipe:`` command, as the setting ``data.shards``.
            global_batch_size: B, images in one step over all ranks.
            samples_per_class: K, images of one class in a group.
            transform: the setting ``data.augment``: ``crop``, ``strong``, ``affine``, ``none`` or ``package:function``.
            seed: the same on every rank.
            num_workers: decoding processes of this rank.
            rank, world_size: this process's; None: those of the default process group.
            data: further settings of the section ``data``, such as ``image_size``, ``lanes``, ``cache``.

        Raises:
            InputError: a setting is impossible, the shards are missing or too few, or the ranks do not divide the
                lanes.
        """
        # The mean has no effect on images that stay bytes; one value fits any number of channels.
        section = {"shards": shards, "augment": transform, "workers": num_workers, "mean": [0.5], "std": [0.5], **data}
        batch = {"global_size": global_batch_size, "samples_per_class": samples_per_class}
        # Some number of epochs that nobody reaches: the stream reads ahead over the end of each.
        raw = {"name": "stream", "epochs": 10**6, "seed": seed, "data": section, "batch": batch}
        network = {"model": {"backbone": "small_cnn"}, "distillation": {"target": "none"}}  # fit for any images
        self._config = parse_config(raw | network, "BalancedStream")
        self.rank = collectives.rank() if rank is None else rank
        self.world_size = collectives.world_size() if world_size is None else world_size
        self.manifest = manifests.load(shards)
        self._classes = manifests.split_classes(self.manifest, seed)[0]
        self._next = (0, 0)
        self._stream: TrainStream | None = None
        self._open()

    def _open(self) -> TrainStream:
        if self._stream is None:
            self._stream = TrainStream(
                self.manifest, self._classes, self._config, self.rank, self.world_size, *self._next,
                pinned=torch.cuda.is_available(),
            )  # fmt: skip
        return self._stream

    @property
    def num_classes(self) -> int:
        return len(self._classes)

    @property
    def classes(self) -> list[str]:
        """Names of the classes; index -> name."""
        return [self.manifest.classes[c] for c in self._classes]

    def __len__(self) -> int:
        """Steps that are left of the next epoch, the same on every rank."""
        epoch, step = self._next
        return self._open().plan(epoch).steps - step

    def set_epoch(self, epoch: int, step: int = 0) -> None:
        """Go to a step of an epoch; what was read ahead for another is dropped."""
        require("step", step, step >= 0, "at least 0")
        if (epoch, step) != self._next:
            self.close()
            self._next = (epoch, step)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the steps that are left of one epoch.

        Raises:
            RunError: a shard or an image is broken, or a decoding process died.
        """
        stream = self._open()
        epoch, first = self._next
        steps = stream.plan(epoch).steps
        for step in range(first, steps):
            batch = next(stream)
            b = len(batch.ids_b)
            labels_b = batch.labels_B[self.rank * b : (self.rank + 1) * b].numpy()
            # Before the yield, since a loop that knows the length may never ask for what comes after the last one.
            self._next = (epoch, step + 1) if step + 1 < steps else (epoch + 1, 0)
            yield Batch(batch.images_b, torch.from_numpy(np.searchsorted(self._classes, labels_b)))

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the batch that was yielded last."""
        return {"epoch": self._next[0], "step": self._next[1], "manifest": self.manifest.digest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a position, also with another number of ranks.

        Raises:
            InputError: it is of other shards, whose batches are others.
        """
        if state["manifest"] != self.manifest.digest:
            raise InputError(
                f"the stream's state is of shards with digest {state['manifest'][:12]} and not of these with "
                f"{self.manifest.digest[:12]}; give the shards that it was saved with, or begin anew with set_epoch"
            )
        self.set_epoch(state["epoch"], state["step"])

    def close(self) -> None:
        """Stop threads and processes. Harmless when called again."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
