"""Evaluation: embed every image once, search exactly over all ranks, and average over all queries.

The numbers are the same for any number of ranks: the search is exact, a metric has one value a query, and means are
taken in the order of the ids.

Shapes: n images of this rank, N of all ranks, q queries of this rank, k neighbours, D embedding dimension.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import nn

from dist_obdsd.config import Config
from dist_obdsd.config.sections import EvaluationConfig
from dist_obdsd.data.from_config import classes_from
from dist_obdsd.data.manifest import Manifest
from dist_obdsd.data.stream import EvalBatch, evaluation_batches
from dist_obdsd.distributed import collectives
from dist_obdsd.distributed.failures import raise_on_all_ranks
from dist_obdsd.distributed.launch import Runtime
from dist_obdsd.errors import InputError, RunError
from dist_obdsd.evaluation.clustering import k_means, nmi, pairwise_f1
from dist_obdsd.evaluation.embedding_sample import EmbeddingSample, sample_embeddings
from dist_obdsd.evaluation.eval_index import EvalIndex, build_eval_index, check_counts
from dist_obdsd.evaluation.geometry import class_distances, rho_spectrum
from dist_obdsd.evaluation.retrieval import ClassRecall, Counts, RankedQuery, retrieve
from dist_obdsd.evaluation.row_blocks import build_row_blocks
from dist_obdsd.transfer import DeviceUploader


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
    """``recall@1``, ..., ``map@r``: means over ``queries``. Those of a named gallery are ``NAME/recall@1``, ..."""
    queries: int
    """``queries``, ``gallery``, ``excluded`` as in ``Counts``, summed over the galleries (mostly one)."""
    gallery: int
    excluded: int
    duplicates: int
    """Images that arrived again under an id already seen, and were dropped."""
    seconds: float = field(compare=False)
    """Wall time of the slowest rank."""
    galleries: dict[str, Counts] = field(default_factory=dict)
    """By name; the gallery without a name is ""."""
    per_class: tuple[ClassRecall, ...] = ()
    """By gallery, then label; classes without a query that counts are missing."""
    failures: tuple[RankedQuery, ...] = ()
    """By gallery, the worst first; see ``Retrieval.failures``."""
    successes: tuple[RankedQuery, ...] = ()
    """By gallery, the best first; see ``Retrieval.successes``."""
    sample: EmbeddingSample | None = field(default=None, compare=False)
    """What figures show of the embeddings, if it was asked for."""


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
            ids.append(batch.ids.cpu())
            labels.append(batch.labels.cpu())
            roles.extend(batch.roles)
    rows_nD = torch.cat([rows.cpu() for rows in embeddings] or [torch.empty(0, 0)])
    return rows_nD, torch.cat(ids), torch.cat(labels), roles


def evaluate(
    embed: Callable[[torch.Tensor], torch.Tensor],
    batches: Iterable[Batch],
    *,
    expected_count: int,
    config: EvaluationConfig,
    device: torch.device,
    seed: int = 0,
    train_classes: int | None = None,
    expected_classes: Mapping[int, int] | None = None,
    sample: bool = False,
) -> EvaluationResult:
    """Embed, search and measure. Collective; the same result on every rank.

    Args:
        embed: as in ``embed_all``; it must be in evaluation mode.
        batches: this rank's share, disjoint from the other ranks' or not (an id counts once).
        The others as in ``measure``.

    Raises:
        RunError, InputError: as in ``measure``, and what ``embed`` or ``batches`` raise; on every rank.
    """
    started = time.perf_counter()
    with raise_on_all_ranks("embedding the evaluation images"):
        rows_nD, ids_n, labels_n, roles = embed_all(embed, batches, device)
    result = measure(
        rows_nD,
        ids_n,
        labels_n,
        roles,
        expected_count=expected_count,
        config=config,
        device=device,
        seed=seed,
        train_classes=train_classes,
        expected_classes=expected_classes,
        sample=sample,
    )
    return replace(result, seconds=max(collectives.gather_json(time.perf_counter() - started)))


def measure(
    rows_nD: torch.Tensor,
    ids_n: torch.Tensor,
    labels_n: torch.Tensor,
    roles: Sequence[str],
    *,
    expected_count: int | None,
    config: EvaluationConfig,
    device: torch.device,
    seed: int = 0,
    train_classes: int | None = None,
    expected_classes: Mapping[int, int] | None = None,
    sample: bool = False,
) -> EvaluationResult:
    """Search and measure embedded images. Collective; the same result on every rank.

    Roles (see ``eval_index``) say which images are queries and which are searched. An image never finds itself. Every
    named gallery is searched and reported alone.

    Args:
        rows_nD: [n, D] float32 or float64 embeddings of this rank, on the CPU; n may be 0 and may differ.
        ids_n: [n] int64; an image that arrives twice counts once.
        labels_n: [n] int64.
        roles: n roles.
        expected_count: images of all ranks, duplicates not counted; None: whatever there is.
        config: what to measure, and which search backend.
        device: where the search runs.
        seed: of k-means.
        train_classes: how many classes the network was trained on, for ``conventions: released``.
        expected_classes: label -> images of all ranks; None: whatever there is.
        sample: whether to keep what figures are drawn from.

    Raises:
        RunError: the images are not those expected, or an embedding is not finite; on every rank.
        InputError: no query has a match, an unknown role, an id with two labels, or more neighbours asked for than the
            gallery has; on every rank.
    """
    started = time.perf_counter()
    rows_nD = _checked_rows(rows_nD, ids_n, labels_n, roles)
    index = build_eval_index(ids_n, labels_n, roles)
    check_counts(index, expected_count, expected_classes)
    rows_nD, place_n = rows_nD[index.kept_n].to(device), index.place_n[index.kept_n]
    found = {name: retrieve(name, rows_nD, place_n, index, config) for name in index.galleries or ("",)}
    metrics = {
        f"{name}/{metric}" if name else metric: value
        for name, of in found.items()
        for metric, value in of.metrics.items()
    }
    metrics |= _of_all_images(rows_nD, place_n, index, config, seed, train_classes)
    return EvaluationResult(
        metrics=metrics,
        queries=sum(of.counts.queries for of in found.values()),
        gallery=sum(of.counts.gallery for of in found.values()),
        excluded=sum(of.counts.excluded for of in found.values()),
        duplicates=index.duplicates,
        seconds=max(collectives.gather_json(time.perf_counter() - started)),
        galleries={name: of.counts for name, of in found.items()},
        per_class=tuple(one for of in found.values() for one in of.per_class),
        failures=tuple(one for of in found.values() for one in of.failures),
        successes=tuple(one for of in found.values() for one in of.successes),
        sample=sample_embeddings(rows_nD, place_n, index, build_row_blocks(rows_nD, place_n), seed) if sample else None,
    )


def _of_all_images(
    rows_nD: torch.Tensor,
    place_n: torch.Tensor,
    index: EvalIndex,
    config: EvaluationConfig,
    seed: int,
    train_classes: int | None,
) -> dict[str, float]:
    """The metrics that know no queries: of queries and galleries together. Collective."""
    metrics: dict[str, float] = {}
    released = config.conventions == "released"
    classes_C, class_N = index.classes
    blocks = build_row_blocks(rows_nD, place_n) if {"nmi", "f1", "rho_spectrum"} & set(config.metrics) else None
    if {"nmi", "f1"} & set(config.metrics) and blocks is not None:
        clusters = train_classes if released else classes_C.numel()
        if clusters is None:
            raise InputError(
                "evaluation.conventions=released makes as many clusters as there are training classes, which these "
                "images do not tell; take nmi and f1 out of evaluation.metrics, or set evaluation.conventions=correct"
            )
        cluster_N, _ = k_means(blocks, clusters, seed=seed)
        measures = {"nmi": nmi, "f1": pairwise_f1}
        metrics |= {name: of(class_N, cluster_N.cpu()) for name, of in measures.items() if name in config.metrics}
    if "distances" in config.metrics:
        metrics |= class_distances(rows_nD, place_n, class_N, cosine=released)
    if "rho_spectrum" in config.metrics and blocks is not None:
        metrics["rho_spectrum"] = rho_spectrum(blocks, leave_out=int(released))
    return metrics


def evaluate_split(
    network: nn.Module,
    manifest: Manifest,
    split: str,
    config: Config,
    runtime: Runtime,
    classes: list[int] | None = None,
    between: Callable[[Iterator[EvalBatch]], Iterator[EvalBatch]] = iter,
    sample: bool = False,
) -> EvaluationResult:
    """Embed this rank's share of a split and measure retrieval over all ranks. Collective; the same on every rank.

    Args:
        between: the batches come through it; what it raises between two of them on any rank ends all ranks' evaluation.
        sample: whether to keep what figures are drawn from.
    """
    wanted = None if classes is None else set(classes)
    expected = Counter(c for shard in manifest.splits[split] for c in shard.classes if wanted is None or c in wanted)
    training = network.training
    network.eval()

    def batches() -> Iterator[EvalBatch]:
        # Opened only where the evaluator reads it, since there a failure on one rank reaches all.
        yield from evaluation_batches(manifest, split, config, runtime.rank, runtime.world_size, classes)

    try:
        with torch.inference_mode():
            return evaluate(
                network.forward,  # and not a call, which model.compile may have replaced
                between(batches()),
                expected_count=expected.total(),
                expected_classes=expected,
                config=config.evaluation,
                device=runtime.device,
                seed=config.seed,
                train_classes=_train_classes(manifest, config),
                sample=sample,
            )
    finally:
        network.train(training)


def _train_classes(manifest: Manifest, config: Config) -> int | None:
    """How many classes were trained on, where a metric asks for it and the shards tell."""
    if config.evaluation.conventions != "released" or "train" not in manifest.splits:
        return None
    return len(classes_from(config, manifest)[0])


def _checked_rows(
    rows_nD: torch.Tensor, ids_n: torch.Tensor, labels_n: torch.Tensor, roles: Sequence[str]
) -> torch.Tensor:
    """The rows, with the dimension and type of the other ranks' where this rank has none. Collective.

    Raises:
        InputError: on every rank: columns of different lengths, or rows of different dimensions or types.
        RunError: on every rank: a row is NaN or infinite.
    """
    with raise_on_all_ranks("the embeddings to evaluate"):
        if rows_nD.ndim != 2 or not rows_nD.is_floating_point():
            raise InputError(
                f"the embeddings have shape {tuple(rows_nD.shape)} and type {rows_nD.dtype}; they must be "
                f"a matrix of float32 or float64"
            )
        sizes = rows_nD.shape[0], ids_n.numel(), labels_n.numel(), len(roles)
        if len(set(sizes)) > 1:
            raise InputError(
                "there are {} embeddings, {} ids, {} labels and {} roles; they must be equally many".format(*sizes)
            )
        bad_n = ~rows_nD.isfinite().all(dim=1)
        if bad_n.any():
            raise RunError(
                f"{int(bad_n.sum())} of {bad_n.numel()} embeddings are NaN or infinite, the first of image id "
                f"{int(ids_n[bad_n][0])}; the network has diverged, so lower the learning rate or go back to a "
                f"checkpoint"
            )
    own = [rows_nD.shape[1], str(rows_nD.dtype)] if ids_n.numel() else None
    kinds = sorted({(dim, kind) for dim, kind in filter(None, collectives.gather_json(own))})
    with raise_on_all_ranks("the embeddings to evaluate"):
        if len(kinds) > 1:
            raise InputError(f"the ranks' embeddings are of different kinds: {kinds}; embed all images alike")
    if kinds and own is None:
        dim, kind = kinds[0]
        return torch.empty(0, dim, dtype=getattr(torch, kind.removeprefix("torch.")))
    return rows_nD
