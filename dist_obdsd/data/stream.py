"""The stream: shards in, batches of decoded images out, as scheduled.

Per rank, one thread reads its lanes' shards window by window (``shard_reader``), another cuts them into batches for the
decoding processes (``decoding_workers``). Order and pixels come from the plan and from (seed, epoch, step, global
row) alone, so they are the same for every number of ranks and of decoding processes, and after a resume.

Letters: b local rows, B global rows, C channels, s image size.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, islice

import torch
from torch import Tensor

from dist_obdsd.config import Config
from dist_obdsd.data.decoding_workers import DecodeFailure, DecodeJob, Decoder, DecodeTask
from dist_obdsd.data.from_config import check_world_size, plan_from
from dist_obdsd.data.manifest import Manifest, Shard, key
from dist_obdsd.data.schedule import EpochPlan
from dist_obdsd.data.shard_reader import Window, WindowReader, cache_of, check_files, read_shard
from dist_obdsd.errors import InputError, RunError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainBatch:
    """This rank's rows of one global batch."""

    epoch: int
    step: int
    images_b: Tensor
    """uint8 [b, C, s, s], on the CPU."""
    ids_b: Tensor
    """int64 [b], the images that are really there: in the row of a broken one another of its class."""
    labels_B: Tensor
    """int64 [B], class ids of the global batch in rank order."""


@dataclass(frozen=True)
class EvalBatch:
    """n images, padded to the split's largest batch: a network sees one shape."""

    images: Tensor
    """uint8 [rows, C, s, s], rows at most evaluation.batch_size; rows from n on are zero."""
    ids: Tensor
    """int64 [n]."""
    labels: Tensor
    """int64 [n] class ids."""
    roles: tuple[str, ...]
    """n roles."""


class TrainStream(Iterator[TrainBatch]):
    """This rank's batches from a position on; reading runs ahead over epochs' ends."""

    def __init__(
        self, manifest: Manifest, classes: list[int], config: Config, rank: int, world_size: int, start_epoch: int = 0,
        start_step: int = 0, pinned: bool = False,
    ) -> None:  # fmt: skip
        """Plan the first epoch and start to read and decode.

        Args:
            classes: the class ids to train on.
            pinned: let the images lie where a GPU can fetch them (see ``transfer``).

        Raises:
            InputError: a shard is missing, ranks, data and batch do not fit, or the position lies beyond the epoch.
        """
        self._manifest, self._config = manifest, config
        self._start = (start_epoch, start_step)
        check_world_size(config, world_size)
        self._rank, self._world_size = rank, world_size
        b = config.batch.global_size // world_size
        self._broken: set[int] = set()
        # Reading runs ahead of training by an epoch or two, by more where an epoch is a step or two.
        self.plan = lru_cache(5)(partial(plan_from, config, manifest, classes))
        """Plans an epoch, of which the latest are kept."""
        check_files(config.data.shards, manifest.splits.get("train", ()))
        if start_epoch < config.epochs and start_step > self.plan(start_epoch).steps:
            raise InputError(
                f"the position is step {start_step} of epoch {start_epoch}, which has {self.plan(start_epoch).steps} "
                f"steps; go on with the shards and batch settings that the run was started with"
            )
        # Its thread starts when it is first asked, which is after the decoding processes were forked.
        self._reader = WindowReader(config.data.shards, self._windows(), cache_of(config.data))
        self._decoder = Decoder(self._jobs(), b, config, config.batch.samples_per_class, pinned)

    def __next__(self) -> TrainBatch:
        """Wait for the next step's rows; RunError for what is broken."""
        decoded = next(self._decoder)
        epoch, step, ids, labels_B = decoded.meta
        ids_b = torch.tensor(ids)
        for failure in decoded.failures:
            ids_b[failure.row] = self._replacement(failure)
        return TrainBatch(epoch, step, decoded.images, ids_b, labels_B)

    def close(self) -> None:
        """Stop the threads and processes. Harmless when called again."""
        self._reader.close()
        self._decoder.close()

    def _replacement(self, failure: DecodeFailure) -> int:
        """Count a broken image and name the one that replaces it, or stop."""
        new = failure.id not in self._broken
        self._broken.add(failure.id)
        allowed = self._config.data.max_bad_samples
        name = f"sample {key(failure.id)} of shard {_shard_of(failure.id, self._manifest.splits['train'])}"
        if len(self._broken) > allowed:
            raise RunError(
                f"{name} cannot be decoded: {failure.reason}; it is number {len(self._broken)} on this rank and "
                f"data.max_bad_samples={allowed} are allowed: repair the data "
                f"(`dist-obdsd verify {self._config.data.shards}`) or raise the limit"
            )
        if failure.replacement is None:
            raise RunError(
                f"{name} cannot be decoded: {failure.reason}; nor can the others of its group: repair the data"
            )
        if new:
            logger.warning(
                "%s cannot be decoded and is replaced (%d of %d): %s", name, len(self._broken), allowed, failure.reason
            )
        return failure.replacement

    def _steps(self) -> Iterator[tuple[EpochPlan, int]]:
        """Yield the plans from the position on, each with its first step."""
        start_epoch, start_step = self._start
        for epoch in range(start_epoch, self._config.epochs):
            yield self.plan(epoch), start_step if epoch == start_epoch else 0

    def _windows(self) -> Iterator[Window]:
        shards = self._manifest.splits["train"]
        lanes = self._config.data.lanes
        mine = range(self._rank * lanes // self._world_size, (self._rank + 1) * lanes // self._world_size)
        if self._config.data.sampling == "released":
            # All lanes have the same windows: the rank reads them as if its rows were one lane's.
            lanes, mine = self._world_size, range(self._rank, self._rank + 1)
        share = self._config.batch.global_size // lanes
        for plan, first in self._steps():
            windows = []
            for lane in mine:
                rows = slice(lane * share, (lane + 1) * share)
                for window, opens, closes in zip(plan.windows[lane], plan.opens[lane], plan.closes[lane], strict=True):
                    if closes >= first:
                        begin = max(opens, first)
                        # Per lane, not per rank: two lanes may share a shard.
                        uses = Counter(plan.ids_SB[begin : closes + 1, rows].ravel().tolist())
                        tars = tuple(shards[i] for i in window)
                        windows.append(Window(plan.epoch, begin, closes, lane, tars, uses))
            yield from sorted(windows, key=lambda window: (window.opens, window.lane))

    def _jobs(self) -> Iterator[DecodeJob]:
        b = self._config.batch.global_size // self._world_size
        for plan, first in self._steps():
            for step in range(first, plan.steps):
                ids = plan.ids_SB[step, self._rank * b : (self._rank + 1) * b].tolist()
                images = self._reader.take(plan.epoch, step, ids)
                tasks = [
                    DecodeTask(sample_id, image, (plan.epoch, step, row))
                    for row, (sample_id, image) in enumerate(zip(ids, images, strict=True), start=self._rank * b)
                ]
                yield DecodeJob((plan.epoch, step, ids, torch.from_numpy(plan.labels_SB[step].copy())), tasks)


def evaluation_batches(
    manifest: Manifest, split: str, config: Config, rank: int, world_size: int, classes: list[int] | None = None
) -> Iterator[EvalBatch]:
    """Yield this rank's share of a split, in batches that do not depend on the ranks.

    The shards that hold images of ``classes`` (default: all), in the order of their ids, are put together in chunks of
    up to one batch; a larger shard is a chunk of several batches. The ranks take the chunks in turn; a rank may get
    none.

    Raises:
        InputError: the split or a shard is missing.
        RunError: a shard or an image is broken. Nothing is replaced here: that would change the result.
    """
    if split not in manifest.splits:
        raise InputError(f"the shards have no split {split!r}; they have {', '.join(sorted(manifest.splits))}")
    chosen = set(manifest.class_ids(split) if classes is None else classes)
    shards = [shard for shard in manifest.splits[split] if not chosen.isdisjoint(shard.classes)]
    check_files(config.data.shards, tuple(shards))
    all_chunks, rows = _eval_chunks(shards, chosen, config.evaluation.batch_size)
    chunks, cache = all_chunks[rank::world_size], cache_of(config.data)

    def jobs() -> Iterator[DecodeJob]:
        for chunk in chunks:
            meta = {
                sample_id: (sample_id, label, role)
                for shard in chunk
                for sample_id, label, role in zip(shard.ids, shard.classes, shard.roles, strict=True)
                if label in chosen
            }
            images = chain.from_iterable(read_shard(config.data.shards, shard, meta, cache) for shard in chunk)
            size = near_equal(len(meta), config.evaluation.batch_size)
            while found := list(islice(images, size)):
                yield DecodeJob([meta[i] for i, _ in found], [DecodeTask(i, image, None) for i, image in found])

    def refuse(sample_id: int, reason: str) -> None:
        raise RunError(
            f"sample {key(sample_id)} of shard {_shard_of(sample_id, chain(*chunks))} cannot be decoded: {reason}; an "
            f"evaluation leaves nothing out: repair the data (`dist-obdsd verify {config.data.shards}`)"
        )

    return decoded_batches(jobs(), rows, config, refuse) if chunks else iter(())


def _eval_chunks(shards: list[Shard], chosen: set[int], batch_size: int) -> tuple[list[list[Shard]], int]:
    """Choose the shards read together, and the rows that batches are padded to."""
    chunks: list[list[Shard]] = []
    largest = filled = 0
    for shard in sorted(shards, key=lambda shard: min(shard.ids)):
        n = sum(label in chosen for label in shard.classes)
        if chunks and filled + n <= batch_size:
            chunks[-1].append(shard)
            filled += n
        else:
            chunks.append([shard])
            filled = n
        largest = max(largest, near_equal(filled, batch_size))
    return chunks, largest


def near_equal(n: int, most: int) -> int:
    """Return the size of near-equal parts of n, the fewest of at most ``most``."""
    return -(-n // -(-n // most))


def decoded_batches(
    jobs: Iterator[DecodeJob], rows: int, config: Config, on_broken: Callable[[int, str], None]
) -> Iterator[EvalBatch]:
    """Decode jobs, whose ``meta`` has (id, class, role) of every image.

    Args:
        rows: that a batch is padded to.
        on_broken: is called with id and reason of an image that cannot be decoded. It raises an error, or returns so
            that the image is left out.
    """
    with closing(Decoder(jobs, rows, config, 1)) as decoder:
        for decoded in decoder:
            for failure in decoded.failures:
                on_broken(failure.id, failure.reason)
            failed = {failure.row for failure in decoded.failures}
            kept = [row for row in range(len(decoded.meta)) if row not in failed]
            images = decoded.images
            if failed:
                images = torch.zeros_like(images)
                images[: len(kept)] = decoded.images[kept]
            meta = [decoded.meta[row] for row in kept]
            ids = torch.tensor([sample_id for sample_id, _, _ in meta], dtype=torch.int64)
            labels = torch.tensor([label for _, label, _ in meta], dtype=torch.int64)
            yield EvalBatch(images, ids, labels, tuple(role for _, _, role in meta))


def _shard_of(sample_id: int, shards: Iterable[Shard]) -> str:
    return next(shard.file for shard in shards if sample_id in shard.ids)
