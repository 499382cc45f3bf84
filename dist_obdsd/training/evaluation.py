"""Evaluation as a config asks for it: its images, settings and checks."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from dist_obdsd.config import Config
from dist_obdsd.data.from_config import classes_from
from dist_obdsd.data.manifest import Manifest, asks, gallery_of
from dist_obdsd.data.stream import EvalBatch, evaluation_batches
from dist_obdsd.distributed import collectives
from dist_obdsd.distributed.failures import raise_on_all_ranks
from dist_obdsd.distributed.launch import Runtime
from dist_obdsd.errors import InputError, RunError
from dist_obdsd.evaluation.evaluator import measure, not_finite
from dist_obdsd.evaluation.metric_parts import Settings
from dist_obdsd.evaluation.retrieval import EvaluationResult
from dist_obdsd.rng import rng
from dist_obdsd.transfer import DeviceUploader


def settings_from(config: Config, manifest: Manifest | None = None) -> Settings:
    """Take an evaluation's settings from a config and the shards that it trains on."""
    section = config.evaluation.model_dump(include={"metrics", "recall_at", "conventions", "distance", "backend"})
    train_classes = None
    if manifest is not None and section["conventions"] == "released" and "train" in manifest.splits:
        train_classes = len(classes_from(config, manifest)[0])
    return Settings(**section, seed=config.seed, train_classes=train_classes)


def embed_all(
    embed: Callable[[torch.Tensor], torch.Tensor], batches: Iterable[EvalBatch], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str]]:
    """Embed this rank's batches, which may be none, without gradient.

    Args:
        embed: uint8 images [rows, C, s, s] on ``device`` -> unit rows [rows, D].

    Returns:
        (embeddings [n, D] float32, ids [n], labels [n], roles n), on the CPU; D is 0 where there is no batch.

    Raises:
        RunError: ``embed`` returned another number of rows than it was given, or rows that are not finite.
    """
    embeddings = []
    roles: list[str] = []
    ids, labels = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
    upload = DeviceUploader(device)
    with torch.no_grad():
        for batch in batches:
            rows = embed(upload(batch.images))
            if rows.ndim != 2 or rows.shape[0] != batch.images.shape[0]:
                raise RunError(
                    f"the network returned shape {tuple(rows.shape)} for {batch.images.shape[0]} images; "
                    f"it must return one row per image"
                )
            # They stay where they are until the end: a copy here would let a GPU wait for the next batch's decoding.
            embeddings.append(rows[: batch.ids.numel()].float())
            ids.append(batch.ids)
            labels.append(batch.labels)
            roles.extend(batch.roles)
    rows_nD, ids_n = torch.cat([rows.cpu() for rows in embeddings] or [torch.empty(0, 0)]), torch.cat(ids)
    if found := not_finite(rows_nD, ids_n):
        raise RunError(f"{found}; the network has diverged, so lower the learning rate or go back to a checkpoint")
    return rows_nD, ids_n, torch.cat(labels), roles


def evaluate_split(
    network: nn.Module, manifest: Manifest, split: str, config: Config, runtime: Runtime,
    classes: list[int] | None = None, between: Callable[[Iterator[EvalBatch]], Iterator[EvalBatch]] = iter,
    sample: bool = False,
) -> EvaluationResult:  # fmt: skip
    """Embed this rank's share of a split and measure retrieval. Collective.

    Args:
        between: the batches come through it; what it raises between two of them on any rank ends all ranks' evaluation.
        sample: whether to keep what figures are drawn from.
    """
    started = time.perf_counter()
    wanted = None if classes is None else set(classes)
    expected = sum(wanted is None or c in wanted for shard in manifest.splits[split] for c in shard.classes)
    training = network.training
    network.eval()
    try:
        with torch.inference_mode():
            # Opened only where a failure on one rank reaches all.
            with raise_on_all_ranks("embedding the evaluation images"):
                batches = evaluation_batches(manifest, split, config, runtime.rank, runtime.world_size, classes)
                # Not a call of the network, which model.compile may have replaced.
                embedded = embed_all(network.forward, between(batches), runtime.device)
            result = measure(
                *embedded, settings_from(config, manifest), expected=expected, device=runtime.device, sample=sample
            )
    finally:
        network.train(training)
    return replace(result, seconds=max(collectives.gather_json(time.perf_counter() - started)))


def validation_subset(manifest: Manifest, classes: Sequence[int], config: Config) -> list[int]:
    """Choose the validation classes that ``validation.max_images`` has room for.

    Classes are taken whole, in an order that the seed gives, as long as they fit; what does not fit is passed over.

    Raises:
        InputError: fewer than two classes fit.
    """
    limit = config.validation.max_images
    if limit is None or not classes:
        return sorted(classes)
    sizes = Counter(label for shard in manifest.splits["train"] for label in shard.classes)
    taken: list[int] = []
    for label in rng(config.seed, "validation images").permutation(np.array(sorted(classes))).tolist():
        if sizes[label] <= limit:
            taken.append(label)
            limit -= sizes[label]
    if len(taken) < 2:
        raise InputError(
            f"validation.max_images={config.validation.max_images} has room for {len(taken)} whole classes and needs "
            f"room for 2; set it to {sum(sorted(sizes[label] for label in classes)[-2:])} or more"
        )
    return sorted(taken)


def check_evaluable(manifest: Manifest, config: Config, validation_classes: Sequence[int]) -> None:
    """Raise InputError before training for what an evaluation after it would refuse.

    The test split and the validation classes need two images of one class, and those that the longest Recall@k
    looks at, and ``validation.max_images`` must have room for two of these.
    """
    validated = set(validation_subset(manifest, validation_classes, config))
    parts = [("validation", "train", validated)] if validated else []
    if config.evaluation.test and "test" in manifest.splits:
        parts.append(("test", "test", set(manifest.class_ids("test"))))
    for name, split, classes in parts:
        images = [
            (label, role)
            for shard in manifest.splits[split]
            for label, role in zip(shard.classes, shard.roles, strict=True)
            if label in classes
        ]
        for gallery in sorted({of for _, role in images if (of := gallery_of(role)) is not None}) or [""]:
            _check_gallery(images, gallery, f"{name} images" + (gallery and f" (gallery {gallery})"), config)


def _check_gallery(images: Sequence[tuple[int, str]], gallery: str, name: str, config: Config) -> None:
    """``check_evaluable`` for one gallery of (class, role) images."""
    offered = Counter(label for label, role in images if gallery_of(role) == gallery)
    # What a query can find: of its class, and in all. It never finds itself.
    matches = [offered[label] - (gallery_of(role) == gallery) for label, role in images if asks(role)]
    others = sum(offered.values()) - any(asks(role) and gallery_of(role) == gallery for _, role in images)
    if not any(matches):
        raise InputError(f"no query of the {name} has another image of its class to find; add images")
    longest = max(config.evaluation.recall_at) if "recall" in config.evaluation.metrics else 1
    if others < longest:
        raise InputError(
            f"evaluation.recall_at asks for {longest} neighbours but a query of the {name} has {others} others; set "
            f"evaluation.recall_at to smaller numbers, or add images"
        )
