"""Evaluation of embeddings: exact search over all ranks, means over queries.

The numbers are the same for any number of ranks: the search is exact, a metric has one value a query, and means are
taken in the order of the ids. ``evaluate`` is the door for any training loop; ``measure`` is what it, the trainer and
the command line call.

Shapes: n images of this rank, N of all ranks, D embedding dimension.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dist_obdsd.distributed import collectives
from dist_obdsd.distributed.collectives import met_by_all, values_by_rank
from dist_obdsd.distributed.failures import raise_on_all_ranks
from dist_obdsd.errors import InputError, RunError
from dist_obdsd.evaluation.eval_index import build_eval_index, check_roles, gather_by_id
from dist_obdsd.evaluation.geometry import sample_embeddings
from dist_obdsd.evaluation.knn import unit_rows
from dist_obdsd.evaluation.metric_parts import EmbeddingSet, Settings
from dist_obdsd.evaluation.metrics import QueryMetric
from dist_obdsd.evaluation.retrieval import EvaluationResult, retrieve

LARGEST, SMALLEST = 1e15, 1e-15
"""Entries of embeddings whose squared distances float32 holds."""
ROLES = ("", "query", "gallery", "both")
"""By whether an image asks, plus twice whether it is searched."""


def evaluate(
    embeddings: Any,
    labels: Any,
    *,
    ids: Any = None,
    queries: Any = None,
    gallery: Any = None,
    metrics: Sequence[str] = ("recall", "map@r"),
    recall_at: Sequence[int] = (1, 2, 4, 8),
    group: collectives.Group = None,
    distance: str = "cosine",
    conventions: str = "correct",
    backend: str = "auto",
    seed: int = 0,
    train_classes: int | None = None,
) -> dict[str, float]:
    """Measure embeddings with exact neighbours over all ranks. Collective.

    >>> numbers = evaluate(embeddings, labels, ids=range(8), recall_at=(1, 2))  # on every rank, with its own share
    >>> numbers["recall@1"], numbers["map@r"]
    (1.0, 1.0)

    Args:
        embeddings: [n, D] floating-point tensor, array or table of this rank; n may be 0 and may differ between ranks.
            The search runs where a tensor is. For ``distance="cosine"`` rows are brought to unit length.
        labels: [n] integers, or texts that name the classes.
        ids: [n] integers, one per image, such as its index in the data set. An image never finds itself, ties go to the
            smaller id, and an image that arrives twice (as samplers pad) counts once. None: rows in rank order, each
            its own image.
        queries: [n] booleans, which images ask; None: all.
        gallery: [n] booleans, which are searched; None: all.
        metrics: of docs/evaluation.md.
        recall_at: the k of Recall@k.
        group: the process group whose ranks take part; None is the default one. Without one, this process is alone.
        distance, conventions, backend: as in the section ``evaluation`` of a config.
        seed: of k-means.
        train_classes: for ``conventions="released"``.

    Returns:
        Each metric, and the counts ``queries`` (the means are over them), ``gallery``, ``excluded`` (queries without
        another image of their class, left out) and ``duplicates`` (images dropped as seen before).

    Raises:
        InputError: on every rank: no images, embeddings that are not finite or of length 0, or labels, ids or settings
            that do not fit.
    """
    with collectives.within(group):
        with raise_on_all_ranks("the images to evaluate"):
            settings = Settings(metrics, recall_at, conventions, distance, backend, seed, train_classes)
            rows = embeddings if torch.is_tensor(embeddings) else np.require(embeddings, requirements="W")
            rows_nD = torch.as_tensor(rows).detach()
            rows_nD = rows_nD.float() if rows_nD.dtype in (torch.float16, torch.bfloat16) else rows_nD
            rows_nD = rows_nD.to(collectives.sends_from(rows_nD.device))
            n = len(rows_nD)
            asks_n, searched_n = (_as_mask("queries", queries, n), _as_mask("gallery", gallery, n))
            roles = [ROLES[code] for code in (asks_n + 2 * searched_n).tolist()]
            if "" in roles:
                raise InputError(f"row {roles.index('')} is neither in queries nor in gallery; leave such images out")
            labels = _as_column("labels", labels, "iuU", "integers or texts")
            ids = None if ids is None else _as_column("ids", ids, "iu", "integers")
        texts = labels.dtype.kind == "U"
        everyone = collectives.gather_json([n, texts, sorted(set(labels.tolist())) if texts else []])
        if len({of_texts for count, of_texts, _ in everyone if count}) > 1:
            message = "labels are texts on some ranks and numbers on others; give all ranks the same kind"
            raise collectives.met_by_all(InputError(message))
        if texts:
            labels = np.searchsorted(np.array(sorted({name for *_, of_rank in everyone for name in of_rank})), labels)
        if ids is None:
            ids = np.arange(n) + sum(count for count, *_ in everyone[: collectives.rank()])
        ids_n, labels_n = (torch.from_numpy(column.astype(np.int64)) for column in (ids, labels))
        result = measure(rows_nD, ids_n, labels_n, roles, settings, normalize=True, device=rows_nD.device)
        counts = {name: getattr(result, name) for name in ("queries", "gallery", "excluded", "duplicates")}
        return result.metrics | counts


def _as_array(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def _as_mask(name: str, values: Any, n: int) -> np.ndarray:
    mask_n = np.ones(n, dtype=bool) if values is None else _as_array(values)
    if mask_n.shape != (n,) or (n and mask_n.dtype != bool):
        raise InputError(f"{name} has type {mask_n.dtype} and shape {mask_n.shape}; give {n} booleans, one per row")
    return mask_n


def _as_column(what: str, values: Any, kinds: str, allowed: str) -> np.ndarray:
    column = _as_array(values)
    if column.dtype == object and all(isinstance(value, str) for value in column):  # as pandas keeps texts
        column = column.astype(str)
    if column.ndim != 1 or (column.size and column.dtype.kind not in kinds):
        raise InputError(
            f"{what} have type {column.dtype} and shape {column.shape}; they must be {allowed}, one per image"
        )
    return column


def not_finite(rows_nD: torch.Tensor, ids_n: torch.Tensor) -> str:
    """Say how many rows are not finite, and the first one's id; nothing if all are."""
    bad_n = ~rows_nD.isfinite().all(dim=1).cpu()
    if not bad_n.any():
        return ""
    return f"{int(bad_n.sum())} of {len(bad_n)} embeddings are NaN or infinite, the first of id {int(ids_n[bad_n][0])}"


def measure(
    rows_nD: torch.Tensor,
    ids_n: torch.Tensor,
    labels_n: torch.Tensor,
    roles: Sequence[str],
    settings: Settings,
    *,
    normalize: bool = False,
    expected: int | None = None,
    device: torch.device | None = None,
    sample: bool = False,
) -> EvaluationResult:
    """Search and measure embedded images. Collective; the same result on every rank.

    An image never finds itself. Every named gallery is searched and reported alone.

    Args:
        rows_nD: [n, D] float32 or float64 embeddings of this rank; n may be 0 and may differ.
        ids_n, labels_n: [n] int64, on the CPU; an image that arrives twice counts once.
        roles: of the n images, see ``eval_index``.
        settings: the same on every rank.
        normalize: bring the rows to unit length first, if the distance is the cosine.
        expected: images of all ranks, duplicates not counted; None: whatever there is.
        device: where the search runs; None: on the CPU.
        sample: whether to keep what figures are drawn from.

    Raises:
        RunError: the images are not those expected, or the ranks' settings differ; on every rank.
        InputError: rows that are not finite or otherwise do not fit, no query with a match, an unknown role, an id with
            two labels, or more neighbours asked for than the gallery has; on every rank.
    """
    started = time.perf_counter()
    with raise_on_all_ranks("the embeddings to evaluate"):
        metrics = settings.build()
        rows_nD = _checked_rows(rows_nD, ids_n, labels_n, roles, settings.distance, normalize)
    kind = [rows_nD.shape[1], str(rows_nD.dtype), rows_nD.device.type] if len(ids_n) else None
    everyone = collectives.gather_json([repr(settings), kind, len(ids_n), sorted(set(roles))])
    requested, kinds, counts, known = (list(column) for column in zip(*everyone, strict=True))
    if len(set(requested)) > 1:
        message = f"the settings of the evaluation differ: {values_by_rank(requested)}; give every rank the same"
        raise met_by_all(RunError(message))
    if len(different := sorted({tuple(kind) for kind in kinds if kind})) > 1:
        message = f"the ranks' embeddings are of different kinds: {different}; embed all images alike"
        raise met_by_all(InputError(message))
    if different and kind is None:  # shape this rank's no rows as others'
        dim, dtype, where = different[0]
        rows_nD = torch.empty(0, dim, dtype=getattr(torch, dtype.removeprefix("torch.")), device=where)
    index = build_eval_index(ids_n, labels_n, roles, counts, sorted(set().union(*known)))
    N = len(index.ids_N)
    if not N or expected not in (None, N):
        message = f"{N} images were embedded but {expected or 'at least 1'} expected; check that every rank "
        raise met_by_all(RunError(f"{message}reads its share of the same shards"))
    rows_ND = gather_by_id(rows_nD, index).to(device or "cpu")
    of_queries = [metric for metric in metrics if isinstance(metric, QueryMetric)]
    found = [retrieve(name, rows_ND, index, of_queries, settings) for name in index.galleries or ("",)]
    values = {name: value for of in found for name, value in of.metrics.items()}
    images = EmbeddingSet(rows_ND, index.classes[1], settings)
    for metric in metrics:
        values |= {} if isinstance(metric, QueryMetric) else metric(images)
    return EvaluationResult(
        metrics=values,
        queries=sum(of.queries for of in found),
        gallery=sum(of.gallery for of in found),
        excluded=sum(of.excluded for of in found),
        duplicates=index.duplicates,
        per_class={key: value for of in found for key, value in of.per_class.items()},
        failures=tuple(one for of in found for one in of.failures),
        successes=tuple(one for of in found for one in of.successes),
        sample=sample_embeddings(rows_ND, index.labels_N, settings.seed) if sample else None,
        seconds=time.perf_counter() - started,
    )


def _checked_rows(
    rows_nD: torch.Tensor, ids_n: torch.Tensor, labels_n: torch.Tensor, roles: Sequence[str], distance: str,
    normalize: bool,
) -> torch.Tensor:  # fmt: skip
    """Check this rank's images; return the rows, brought to unit length if asked for."""
    if rows_nD.ndim != 2 or not rows_nD.is_floating_point():
        raise InputError(
            f"the embeddings have shape {tuple(rows_nD.shape)} and type {rows_nD.dtype}; they must be "
            f"a matrix of floating-point numbers, a row per image"
        )
    sizes = len(rows_nD), len(ids_n), len(labels_n), len(roles)
    if len(set(sizes)) > 1:
        raise InputError(
            "there are {} embeddings, {} ids, {} labels and {} roles; they must be equally many".format(*sizes)
        )
    if found := not_finite(rows_nD, ids_n):
        raise InputError(f"{found}; leave such images out or embed them again")
    check_roles(roles)
    if distance == "cosine" and normalize:
        zero_n = ~rows_nD.any(dim=1).cpu()
        if zero_n.any():
            raise InputError(
                f"{int(zero_n.sum())} embeddings have length 0, the first of id {int(ids_n[zero_n][0])}, and so no "
                f"cosine; leave such images out or take the Euclidean distance"
            )
        return unit_rows(rows_nD)
    if distance == "euclidean" and rows_nD.any() and not SMALLEST < (largest := float(rows_nD.abs().max())) < LARGEST:
        raise InputError(
            f"embeddings have entries up to {largest:.3g}, whose squares float32 does not hold; scale them to "
            f"about 1, or take the cosine distance"
        )
    return rows_nD
