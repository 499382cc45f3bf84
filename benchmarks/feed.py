"""Batches for ``bench step``: one that is made up, again and again, or those of a training run's stream."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from dist_obdsd.config import Config
from dist_obdsd.data import manifest as manifests
from dist_obdsd.data.from_config import classes_from
from dist_obdsd.data.stream import TrainBatch, TrainStream
from dist_obdsd.distributed import launch

EPOCHS = 100_000
"""Of a stream, which begins in the middle, at half the ramp, and never comes to its end."""


class Feed(AbstractContextManager["Feed"]):
    """Hands out batches of the second half of all epochs; all arms of a rank share one."""

    classes: Sequence[int]
    """That the labels are of, sorted."""

    def __init__(self, config: Config, rank: launch.Runtime) -> None:
        """Make a batch up, in pinned memory for a GPU, or start to read. Collective.

        Args:
            config: its ``data.shards`` is empty where images are to be made up.

        Raises:
            InputError: the shards cannot be read or do not fit the batch.
        """
        self._stream: TrainStream | None = None
        B, data, cuda = config.batch.global_size, config.data, rank.device.type == "cuda"
        if data.shards:
            manifest = manifests.load(data.shards)
            self.classes, _ = classes_from(config, manifest)
            self._stream = TrainStream(
                manifest, self.classes, config, rank.rank, rank.world_size, config.epochs // 2, 0, pinned=cuda
            )
            return
        self.classes = range(B // 2)
        shape = (B // rank.world_size, data.channels, data.image_size, data.image_size)
        images_b = torch.randint(0, 256, shape, dtype=torch.uint8)
        images_b = images_b.pin_memory() if cuda else images_b
        self._batch = TrainBatch(config.epochs // 2, 0, images_b, torch.arange(len(images_b)), torch.arange(B) // 2, [])

    def __call__(self) -> TrainBatch:
        return self._batch if self._stream is None else next(self._stream)

    def __exit__(self, *error: object) -> None:
        if self._stream is not None:
            self._stream.close()
