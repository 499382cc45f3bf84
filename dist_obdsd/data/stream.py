"""The stream: shards in, batches of decoded images out, in the order of the schedule.

Per rank, one thread reads its lanes' shards window by window (``reading``), another cuts them into batches for the
decoding processes (``decoding``). Order and pixels come from the plan and from (seed, epoch, step, global row) alone,
so they are the same for every number of ranks and of decoding processes, and after a resume.

Letters: b local rows, B global rows, C channels, s image size.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_obdsd.config import Config
from dist_obdsd.data.cache import Cache
from dist_obdsd.data.decode_tasks import Bad, Row
from dist_obdsd.data.decoding_workers import Decoder, Job
from dist_obdsd.data.gpu import DeviceDecoder
from dist_obdsd.data.manifest import Manifest, Shard, key
from dist_obdsd.data.schedule import EpochPlan, lanes_of, plan_from
from dist_obdsd.data.shard_reader import Window, WindowReader, cache_of, check_files, read_shard
from dist_obdsd.errors import InputError, RunError


@dataclass(frozen=True)
class Batch:
    """This rank's rows of one global batch."""

    epoch: int
    step: int
    images_b: Tensor
    """uint8 [b, C, s, s], on the CPU, or on the device that decoded them."""
    ids_b: Tensor
    """int64 [b], the images that are really there."""
    labels_B: Tensor
    """int64 [B], class ids of the global batch in rank order."""
    replaced: list[str]
    """Names of this batch's broken images, in whose rows another image of the class stands."""


@dataclass(frozen=True)
class EvaluationBatch:
    """n images, padded to the largest batch of the split so that a network sees one shape."""

    images: Tensor
    """uint8 [rows, C, s, s], rows at most evaluation.batch_size; rows from n on are zero."""
    ids: Tensor
    """int64 [n]."""
    labels: Tensor
    """int64 [n] class ids."""
    roles: tuple[str, ...]
    """n roles."""


class TrainStream:
    """This rank's batches from a position on, over all epochs, so that reading runs ahead over an epoch's end."""

    def __init__(
        self,
        manifest: Manifest,
        classes: list[int],
        config: Config,
        rank: int,
        world_size: int,
        start_epoch: int = 0,
        start_step: int = 0,
        warn: Callable[[str], None] = print,
        pinned: bool = False,
        device_decoder: DeviceDecoder | None = None,
    ) -> None:
        """Plan the first epoch and start to read and decode.

        Args:
            classes: the class ids to train on.
            warn: is told once of every broken image that is replaced.
            pinned: let the images lie in memory that a GPU can fetch by itself.
            device_decoder: decodes what it can, so that the batches' images come on its device.

        Raises:
            InputError: a shard file is missing, the world size does not divide the lanes, the data is too small for
                the batch, or the position lies beyond the epoch.
        """
        self._manifest, self._classes, self._config = manifest, classes, config
        self._start = (start_epoch, start_step)
        self._lanes = lanes_of(rank, world_size, config.data.lanes)
        b = config.batch.global_size // world_size
        self._rows = slice(rank * b, (rank + 1) * b)
        self._warn = warn
        self._bad: set[int] = set()
        self._plans: dict[int, EpochPlan] = {}
        self._planning = threading.Lock()
        check_files(config.data.shards, manifest.splits.get("train", ()))
        self._cache = cache_of(config.data)
        if start_epoch < config.epochs and start_step > self.plan(start_epoch).steps:
            raise InputError(
                f"the position is step {start_step} of epoch {start_epoch}, which has {self.plan(start_epoch).steps} "
                f"steps; go on with the shards and batch settings that the run was started with"
            )
        # The reader's thread starts only after the decoding processes were forked.
        self._reader: WindowReader | None = None
        self._opening, self._closed = threading.Lock(), False
        self._device_decoder = device_decoder
        self._decoder = Decoder(
            self._jobs(), b, config, config.batch.samples_per_class, device_decoder is not None, pinned, warn
        )

    def plan(self, epoch: int) -> EpochPlan:
        """The plan of an epoch. The latest ones are kept."""
        with self._planning:
            plan = self._plans.get(epoch)
            if plan is None:
                plan = plan_from(self._config, self._manifest, self._classes, epoch)
                # Reading runs ahead of training by an epoch or two, by more where an epoch is a step or two.
                for old in sorted(self._plans)[:-4]:
                    del self._plans[old]
                self._plans[epoch] = plan
            return plan

    def __iter__(self) -> "TrainStream":
        return self

    def __next__(self) -> Batch:
        """The next step's rows.

        Raises:
            StopIteration: all epochs are done.
            RunError: a shard or an image is broken, or a decoding process died.
        """
        decoded = next(self._decoder)
        epoch, step, ids, labels_B = decoded.about
        images_b, broken = decoded.images, decoded.bad
        if self._device_decoder is not None:
            images_b, broken = self._device_decoder(decoded)
        ids_b = torch.tensor(ids)
        for bad in broken:
            ids_b[bad.row] = self._accept(bad)
        return Batch(epoch, step, images_b, ids_b, labels_B, [key(bad.id) for bad in broken])

    def close(self) -> None:
        """Stop the threads and processes. Harmless when called again."""
        with self._opening:
            if self._closed:
                return
            self._closed = True
            if self._reader is not None:
                self._reader.close()
        self._decoder.close()

    def _accept(self, bad: Bad) -> int:
        """Count a broken image and name the one that replaces it, or stop."""
        new = bad.id not in self._bad
        self._bad.add(bad.id)
        allowed = self._config.data.max_bad_samples
        name = f"sample {key(bad.id)} of shard {_shard_of(bad.id, self._manifest.splits['train'])}"
        if len(self._bad) > allowed:
            raise RunError(
                f"{name} cannot be decoded: {bad.reason}; it is number {len(self._bad)} on this rank and "
                f"data.max_bad_samples={allowed} are allowed: repair the data "
                f"(`dist-obdsd verify {self._config.data.shards}`) or raise the limit"
            )
        if bad.replacement is None:
            raise RunError(f"{name} cannot be decoded: {bad.reason}; nor can the others of its group: repair the data")
        if new:
            self._warn(f"{name} cannot be decoded and is replaced ({len(self._bad)} of {allowed}): {bad.reason}")
        return bad.replacement

    def _steps(self) -> Iterator[tuple[EpochPlan, int]]:
        """The plans from the position on, each with its first step."""
        start_epoch, start_step = self._start
        for epoch in range(start_epoch, self._config.epochs):
            yield self.plan(epoch), start_step if epoch == start_epoch else 0

    def _windows(self) -> Iterator[Window]:
        shards = self._manifest.splits["train"]
        for plan, first in self._steps():
            share = plan.ids_SB.shape[1] // self._config.data.lanes
            windows = []
            for lane in self._lanes:
                # Per lane, not per rank: two lanes may share a shard.
                uses = Counter(plan.ids_SB[first:, lane * share : (lane + 1) * share].ravel().tolist())
                windows += [
                    Window(plan.epoch, max(opens, first), closes, lane, tuple(shards[i] for i in window), uses)
                    for window, opens, closes in zip(
                        plan.windows[lane], plan.opens[lane], plan.closes[lane], strict=True
                    )
                    if closes >= first
                ]
            yield from sorted(windows, key=lambda window: (window.opens, window.lane))

    def _jobs(self) -> Iterator[Job]:
        with self._opening:
            if self._closed:
                return
            self._reader = WindowReader(self._config.data.shards, self._windows(), self._cache)
        for plan, first in self._steps():
            for step in range(first, plan.steps):
                ids = plan.ids_SB[step, self._rows].tolist()
                images = self._reader.take(plan.epoch, step, ids)
                rows = [
                    Row(sample_id, image, (plan.epoch, step, row))
                    for row, (sample_id, image) in enumerate(zip(ids, images, strict=True), start=self._rows.start)
                ]
                yield Job((plan.epoch, step, ids, torch.from_numpy(plan.labels_SB[step].copy())), rows)


def evaluation_batches(
    manifest: Manifest,
    split: str,
    config: Config,
    rank: int,
    world_size: int,
    classes: list[int] | None = None,
) -> Iterator[EvaluationBatch]:
    """This rank's share of a split, in batches whose composition does not depend on the number of ranks.

    The shards that hold images of ``classes`` (default: all), in the order of their ids, are put together in parcels of
    up to one batch; a larger shard is a parcel of several batches. The parcels are dealt to the ranks in turn; a rank
    may get none.

    Raises:
        InputError: the split or a shard is missing.
        RunError: a shard or an image is broken. Nothing is replaced here: that would change the result.
    """
    if split not in manifest.splits:
        raise InputError(f"the shards have no split {split!r}; they have {', '.join(sorted(manifest.splits))}")
    chosen = set(manifest.class_ids(split) if classes is None else classes)
    shards = [shard for shard in manifest.splits[split] if not chosen.isdisjoint(shard.classes)]
    check_files(config.data.shards, tuple(shards))
    parcels, rows = _parcels(shards, chosen, config.evaluation.batch_size)
    return _evaluate(parcels[rank::world_size], rows, chosen, config, cache_of(config.data))


def _parcels(shards: list[Shard], chosen: set[int], batch_size: int) -> tuple[list[list[Shard]], int]:
    """What is read and embedded together, and the rows that every batch is padded to: the largest batch's."""
    parcels: list[list[Shard]] = []
    largest = filled = 0
    for shard in sorted(shards, key=lambda shard: min(shard.ids)):
        n = sum(label in chosen for label in shard.classes)
        if parcels and filled + n <= batch_size:
            parcels[-1].append(shard)
            filled += n
        else:
            parcels.append([shard])
            filled = n
        largest = max(largest, near_equal(filled, batch_size))
    return parcels, largest


def near_equal(n: int, most: int) -> int:
    """The size of n cut into the fewest parts of at most ``most``, as equal as can be."""
    return -(-n // -(-n // most))


def _evaluate(
    parcels: list[list[Shard]], rows: int, chosen: set[int], config: Config, cache: Cache | None
) -> Iterator[EvaluationBatch]:
    if not parcels:
        return
    decoder = Decoder(_evaluation_jobs(parcels, chosen, config, cache), rows, config, 1)
    try:
        for decoded in decoder:
            for bad in decoded.bad:
                shards = tuple(shard for parcel in parcels for shard in parcel)
                raise RunError(
                    f"sample {key(bad.id)} of shard {_shard_of(bad.id, shards)} cannot be decoded: {bad.reason}; an "
                    f"evaluation leaves nothing out: repair the data (`dist-obdsd verify {config.data.shards}`)"
                )
            ids, labels, roles = zip(*decoded.about, strict=True)
            yield EvaluationBatch(decoded.images, torch.tensor(ids), torch.tensor(labels), roles)
    finally:
        decoder.close()


def _evaluation_jobs(
    parcels: list[list[Shard]], chosen: set[int], config: Config, cache: Cache | None
) -> Iterator[Job]:
    """One job per batch; ``about`` has each row's (id, class, role)."""
    for parcel in parcels:
        about = {
            sample_id: (sample_id, label, role)
            for shard in parcel
            for sample_id, label, role in zip(shard.ids, shard.classes, shard.roles, strict=True)
            if label in chosen
        }
        size = near_equal(len(about), config.evaluation.batch_size)
        rows: list[Row] = []
        for shard in parcel:
            for sample_id, image in read_shard(config.data.shards, shard, about.keys(), cache):
                rows.append(Row(sample_id, image, None))
                if len(rows) == size:
                    yield Job([about[row.id] for row in rows], rows)
                    rows = []
        if rows:
            yield Job([about[row.id] for row in rows], rows)


def _shard_of(sample_id: int, shards: tuple[Shard, ...]) -> str:
    return next(shard.file for shard in shards if sample_id in shard.ids)
