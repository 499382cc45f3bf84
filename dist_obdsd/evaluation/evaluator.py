"""Evaluation: embed every image once, search exactly over all ranks, and average over all queries.

The numbers have the same bits for any number of ranks: the search is exact, per-query values are computed in a fixed
order, and the mean is the correctly rounded sum of all ranks' values over their number.

Shapes: n images of this rank, N of all ranks, q queries of this rank, k neighbours, D embedding dimension.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from dist_obdsd import collectives, config
from dist_obdsd.config import Config
from dist_obdsd.data.manifest import Manifest
from dist_obdsd.data.stream import EvaluationBatch, evaluation_batches
from dist_obdsd.errors import InputError, RunError
from dist_obdsd.evaluation.metrics import map_at_r, recall_at_k
from dist_obdsd.evaluation.search import labels_of, nearest
from dist_obdsd.runtime import Runtime

# Training images are evaluated only where their classes are held out for validation, as queries and gallery.
QUERY_ROLES = ("both", "query", "train")
GALLERY_ROLES = ("both", "gallery", "train")


class Batch(Protocol):
    """Images to embed. The first n rows are real, the rest pads to a fixed size, so that rows round the same always."""

    @property
    def images(self) -> torch.Tensor: ...  # uint8 [batch_size, C, s, s]
    @property
    def ids(self) -> torch.Tensor: ...  # int64 [n]
    @property
    def labels(self) -> torch.Tensor: ...  # int64 [n]
    @property
    def roles(self) -> Sequence[str]: ...  # n


@dataclass(frozen=True)
class EvaluationResult:
    """What one evaluation found; the same on every rank."""

    metrics: dict[str, float]
    """``recall@1``, ..., ``map@r``: means over ``queries``."""
    queries: int
    """Queries that the metrics are means over."""
    gallery: int
    """Images searched."""
    excluded: int
    """Further queries that have no other image of their class in the gallery, and so nothing to find."""
    duplicates: int
    """Images that arrived again under an id already seen, and were dropped."""
    seconds: float = field(compare=False)
    """Wall time of the slowest rank."""


def embed_all(
    embed: Callable[[torch.Tensor], torch.Tensor], batches: Iterable[Batch], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str]]:
    """Embed this rank's batches, without gradient.

    Args:
        embed: uint8 images [batch_size, C, s, s] on ``device`` -> unit rows [batch_size, D].
        batches: this rank's share; may be empty.
        device: where ``embed`` runs.

    Returns:
        (embeddings [n, D] float32, ids [n], labels [n], roles n), on the CPU; D is 0 where there is no batch.

    Raises:
        RunError: ``embed`` returned another number of rows than it was given.
    """
    embeddings = []
    ids, labels = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
    roles: list[str] = []
    with torch.no_grad():
        for batch in batches:
            rows = embed(batch.images.to(device))
            if rows.ndim != 2 or rows.shape[0] != batch.images.shape[0]:
                raise RunError(
                    f"the network returned shape {tuple(rows.shape)} for {batch.images.shape[0]} images; "
                    f"it must return one row per image"
                )
            embeddings.append(rows[: batch.ids.numel()].float().cpu())
            ids.append(batch.ids.cpu())
            labels.append(batch.labels.cpu())
            roles.extend(batch.roles)
    return torch.cat(embeddings or [torch.empty(0, 0)]), torch.cat(ids), torch.cat(labels), roles


def evaluate(
    embed: Callable[[torch.Tensor], torch.Tensor],
    batches: Iterable[Batch],
    *,
    expected_count: int,
    config: config.Evaluation,
    device: torch.device,
) -> EvaluationResult:
    """Embed, search and measure. Collective; the same result on every rank.

    Queries are the images with role both, query or train; the gallery those with role both, gallery or train. An
    image never finds itself.

    Args:
        embed: as in ``embed_all``; it must be in evaluation mode.
        batches: this rank's share, disjoint from the other ranks' or not (an id counts once).
        expected_count: images of all ranks, duplicates not counted.
        config: which Recall@k, and which search backend.
        device: where ``embed`` and the search run.

    Raises:
        RunError: the images were not ``expected_count``, or an embedding is not finite; on every rank.
        InputError: no query has a match, an unknown role, or a ``recall_at`` beyond the gallery; on every rank.
    """
    started = time.perf_counter()
    with collectives.agree("embedding the evaluation images"):
        rows_nD, ids_n, labels_n, roles = embed_all(embed, batches, device)
        unknown = set(roles) - set(QUERY_ROLES) - set(GALLERY_ROLES)
        if unknown:
            raise InputError(
                f"an image has the role {min(unknown)!r}; roles are {', '.join(sorted({*QUERY_ROLES, *GALLERY_ROLES}))}"
            )
    shares = collectives.gather_json([ids_n.numel(), rows_nD.shape[1]])
    if not ids_n.numel():
        rows_nD = rows_nD.new_empty(0, max(dim for _, dim in shares))
    kept_n, duplicates = _first_occurrences(ids_n, [size for size, _ in shares])
    count = sum(size for size, _ in shares) - duplicates
    with collectives.agree("the count of evaluation images"):
        if count != expected_count or not count:
            raise RunError(
                f"{count} images were embedded but {expected_count} are expected; check that every rank reads its "
                f"share of the same shards"
            )
    is_query_n = kept_n & _has_role(roles, QUERY_ROLES)
    is_gallery_n = kept_n & _has_role(roles, GALLERY_ROLES)

    gallery_N = collectives.gather_ragged(torch.stack([ids_n, labels_n], dim=1)[is_gallery_n])  # [N, 2]
    relevant_count_q = _relevant_counts(ids_n[is_query_n], labels_n[is_query_n], gallery_N)
    matched_q = relevant_count_q > 0
    tallies = collectives.gather_json(
        [int(matched_q.sum()), matched_q.numel(), int(relevant_count_q.max()) if matched_q.numel() else 0]
    )
    queries, all_queries, largest_r = sum(t[0] for t in tallies), sum(t[1] for t in tallies), max(t[2] for t in tallies)
    with collectives.agree("the count of queries"):
        if not queries:
            raise InputError(
                f"none of the {all_queries} queries has another image of its class among the {gallery_N.shape[0]} "
                f"gallery images; evaluation needs classes with at least two images"
            )

    query_ids_q, query_labels_q = ids_n[is_query_n][matched_q], labels_n[is_query_n][matched_q]
    neighbours = nearest(
        rows_nD[is_query_n][matched_q].to(device),
        query_ids_q.to(device),
        rows_nD[is_gallery_n].to(device),
        ids_n[is_gallery_n].to(device),
        max(*config.recall_at, largest_r),
        backend=config.backend,
    )
    found_qk = labels_of(neighbours.ids_qk.cpu(), gallery_N[:, 0].contiguous(), gallery_N[:, 1])
    relevant_qk = found_qk == query_labels_q[:, None]
    values = {f"recall@{k}": value_q for k, value_q in recall_at_k(relevant_qk, config.recall_at).items()}
    values["map@r"] = map_at_r(relevant_qk, relevant_count_q[matched_q])
    return EvaluationResult(
        metrics=global_means(values),
        queries=queries,
        gallery=gallery_N.shape[0],
        excluded=all_queries - queries,
        duplicates=duplicates,
        seconds=max(collectives.gather_json(time.perf_counter() - started)),
    )


def evaluate_split(
    network: nn.Module,
    manifest: Manifest,
    split: str,
    settings: Config,
    runtime: Runtime,
    classes: list[int] | None = None,
) -> EvaluationResult:
    """Embed this rank's share of a split and measure retrieval over all ranks. Collective; the same on every rank."""
    wanted = None if classes is None else set(classes)
    expected = sum(wanted is None or c in wanted for shard in manifest.splits[split] for c in shard.classes)
    training = network.training
    network.eval()

    def batches() -> Iterator[EvaluationBatch]:
        # Opened only where the evaluator reads it, since there a failure on one rank reaches all.
        yield from evaluation_batches(manifest, split, settings, runtime.rank, runtime.world_size, classes)

    try:
        with torch.inference_mode():
            return evaluate(
                network,
                batches(),
                expected_count=expected,
                config=settings.evaluation,
                device=runtime.device,
            )
    finally:
        network.train(training)


def check_evaluable(manifest: Manifest, settings: Config, validation_classes: Sequence[int]) -> None:
    """Find out before training what an evaluation after it would refuse.

    Raises:
        InputError: the test split or the validation classes have no two images of one class, or fewer images than the
            longest Recall@k looks at.
    """
    parts = [("validation", "train", set(validation_classes))] if validation_classes else []
    if settings.evaluation.test and "test" in manifest.splits:
        parts.append(("test", "test", set(manifest.class_ids("test"))))
    for name, split, classes in parts:
        images = [
            (label, role)
            for shard in manifest.splits[split]
            for label, role in zip(shard.classes, shard.roles, strict=True)
            if label in classes
        ]
        gallery = Counter(label for label, role in images if role in GALLERY_ROLES)
        # What a query can find: of its class, and in all. It never finds itself.
        matches = [gallery[label] - (role in GALLERY_ROLES) for label, role in images if role in QUERY_ROLES]
        others = sum(gallery.values()) - any(role in QUERY_ROLES and role in GALLERY_ROLES for _, role in images)
        if not any(matches):
            raise InputError(f"no query of the {name} images has another image of its class to find; add images")
        if others < max(settings.evaluation.recall_at):
            raise InputError(
                f"evaluation.recall_at asks for {max(settings.evaluation.recall_at)} neighbours but a query of the "
                f"{name} images has {others} others; set evaluation.recall_at to smaller numbers, or add images"
            )


def global_means(values: dict[str, torch.Tensor]) -> dict[str, float]:
    """The means over all ranks' queries of per-query values [q] float64. Collective.

    The sum is exact and rounded once (``math.fsum``), so neither the ranks nor the order of the queries can change it.
    """
    values_NM = collectives.gather_ragged(torch.stack(list(values.values()), dim=1))
    return {
        name: math.fsum(value_N.tolist()) / value_N.numel() for name, value_N in zip(values, values_NM.T, strict=True)
    }


def _has_role(roles: Sequence[str], wanted: Sequence[str]) -> torch.Tensor:
    return torch.tensor([role in wanted for role in roles], dtype=torch.bool)


def _first_occurrences(ids_n: torch.Tensor, sizes: Sequence[int]) -> tuple[torch.Tensor, int]:
    """Which of this rank's images are the first with their id, in rank order ([n] bool); and how many are not, on all
    ranks."""
    ids_N = collectives.gather_ragged(ids_n)
    order_N = ids_N.argsort(stable=True)
    sorted_N = ids_N[order_N]
    first_N = torch.ones_like(ids_N, dtype=torch.bool)
    first_N[order_N[1:]] = sorted_N[1:] != sorted_N[:-1]
    start = sum(sizes[: collectives.rank()])
    return first_N[start : start + ids_n.numel()], int((~first_N).sum())


def _relevant_counts(ids_q: torch.Tensor, labels_q: torch.Tensor, gallery_N: torch.Tensor) -> torch.Tensor:
    """R: gallery images of the query's class, the query itself excluded. [q] int64."""
    classes, counts = gallery_N[:, 1].unique(return_counts=True)
    if not classes.numel():
        return torch.zeros_like(labels_q)
    place_q = torch.searchsorted(classes, labels_q).clamp(max=classes.numel() - 1)
    count_q = counts[place_q] * (classes[place_q] == labels_q)
    return count_q - torch.isin(ids_q, gallery_N[:, 0]).long()
