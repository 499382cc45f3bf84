"""Retrieval the slow and obvious way: Python floats (which are float64), double loops, nothing of the package."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

Row = Sequence[float]


def score(a: Row, b: Row, distance: str = "cosine") -> float:
    total = 0.0
    for x, y in zip(a, b, strict=True):
        total += x * y if distance == "cosine" else -(x - y) * (x - y)
    return total


def nearest(
    queries: Sequence[Row], query_ids: Sequence[int], gallery: Sequence[Row], gallery_ids: Sequence[int], k: int,
    distance: str = "cosine",
) -> dict[int, list[tuple[float, int]]]:  # fmt: skip
    """Query id -> its k best (score, id) but itself, ties by the smaller id."""
    found = {}
    for query, query_id in zip(queries, query_ids, strict=True):
        ranked = sorted(
            (-score(query, row, distance), row_id)
            for row, row_id in zip(gallery, gallery_ids, strict=True)
            if row_id != query_id
        )
        found[query_id] = [(-negated, row_id) for negated, row_id in ranked[:k]]
    return found


def average_precision(relevant: Sequence[bool], places: int, divisor: int) -> float:
    total = 0.0
    for i in range(1, min(places, len(relevant)) + 1):
        if relevant[i - 1]:  # added one by one, unlike what ``sum`` does with floats
            total += sum(relevant[:i]) / i
    return total / max(divisor, 1)


def evaluate(
    rows: dict[int, Row], labels: dict[int, int], roles: dict[int, str], recall_at: Sequence[int], *,
    gallery_roles: Sequence[str], released: bool,
) -> tuple[dict[str, float], int, int]:  # fmt: skip
    """(metrics, queries with a match, queries without one) for images given by id.

    Args:
        released: class sizes with the query, and queries without a match as failures.
    """
    gallery = [i for i in rows if roles[i] in gallery_roles]
    values: dict[str, list[float]] = {}
    queries = excluded = 0
    for query in rows:
        if roles[query] not in ("both", "query", "train"):
            continue
        r = sum(labels[i] == labels[query] for i in gallery if i != query)
        size = sum(labels[i] == labels[query] for i in gallery) if released else r
        if r == 0 and not released:
            excluded += 1
            continue
        queries += 1
        found = nearest([rows[query]], [query], [rows[i] for i in gallery], gallery, len(gallery))[query]
        relevant = [labels[i] == labels[query] for _, i in found]
        of_query = {f"recall@{k}": float(any(relevant[:k])) for k in recall_at} | {
            "r_precision": sum(relevant[:r]) / max(r, 1),
            "map@r": average_precision(relevant, r, r),
            "map@1000": average_precision(relevant, 1000, size),
            "map@c": average_precision(relevant, size, size),
        }
        for name, value in of_query.items():
            values.setdefault(name, []).append(value)
    means = {name: sum(of_queries) / len(of_queries) for name, of_queries in values.items()}
    return means, queries, excluded


# ---- clusters -------------------------------------------------------------------------------------------------------


def nearest_centres(rows: Sequence[Row], centres: Sequence[Row]) -> list[int]:
    scores = [[score(row, c) - score(c, c) / 2 for c in centres] for row in rows]
    return [of_row.index(max(of_row)) for of_row in scores]


def k_means(
    rows: Sequence[Row], centres: list[list[float]], iterations: int = 20
) -> tuple[list[int], list[list[float]]]:
    """(cluster of each row, centres). ``rows`` come by ascending id, so that the first of equals has the smaller id."""
    clusters = nearest_centres(rows, centres)
    for _ in range(iterations):
        members = [[row for row, c in zip(rows, clusters, strict=True) if c == at] for at in range(len(centres))]
        centres = [
            [math.fsum(column) / len(of) for column in zip(*of, strict=True)] if of else [0.0] * len(rows[0])
            for of in members
        ]
        empty = [at for at, of in enumerate(members) if not of]
        far = [
            score(*(2 * [[x - y for x, y in zip(r, centres[c], strict=True)]]))
            for r, c in zip(rows, clusters, strict=True)
        ]
        order = sorted((i for i in range(len(rows)) if far[i] > 0), key=lambda i: (-far[i], i))
        for at, i in zip(empty, order, strict=False):
            centres[at] = list(rows[i])
        before, clusters = clusters, nearest_centres(rows, centres)
        if clusters == before:
            break
    return clusters, centres


def nmi(classes: Sequence[int], clusters: Sequence[int]) -> float:
    n = len(classes)
    both, left, right = Counter(zip(classes, clusters, strict=True)), Counter(classes), Counter(clusters)
    mutual = sum(m / n * math.log((m / n) / (left[a] / n * right[b] / n)) for (a, b), m in both.items())
    entropies = [-sum(m / n * math.log(m / n) for m in of.values()) for of in (left, right)]
    return 2 * mutual / sum(entropies)


def pairwise_f1(classes: Sequence[int], clusters: Sequence[int]) -> float:
    pairs = list(itertools.combinations(zip(classes, clusters, strict=True), 2))
    right, wanted, claimed = (sum(a[of] == b[of] for a, b in pairs) for of in (slice(2), 0, 1))
    precision, found = right / claimed, right / wanted
    return 2 * precision * found / (precision + found)


# ---- geometry -------------------------------------------------------------------------------------------------------


def _euclidean(a: Row, b: Row) -> float:
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))


def _cosine(a: Row, b: Row) -> float:
    return 1 - score(a, b) / math.sqrt(score(a, a) * score(b, b))


def class_distances(rows: Sequence[Row], classes: Sequence[int], *, cosine: bool) -> dict[str, float]:
    distance = _cosine if cosine else _euclidean
    members = {c: [row for row, of in zip(rows, classes, strict=True) if of == c] for c in sorted(set(classes))}
    if cosine:
        members = {c: [[x / math.sqrt(score(r, r)) for x in r] for r in of] for c, of in members.items()}
    within = [
        sum(distance(a, b) for i, a in enumerate(of) for j, b in enumerate(of) if i != j) / (len(of) * (len(of) - 1))
        for of in members.values()
        if len(of) > 1
    ]
    means = [[sum(column) / len(of) for column in zip(*of, strict=True)] for of in members.values()]
    between = [distance(a, b) for i, a in enumerate(means) for j, b in enumerate(means) if i != j]
    intra, inter = sum(within) / len(within), sum(between) / len(between)
    return {"distance_intra": intra, "distance_inter": inter, "distance_ratio": intra / max(inter, 1e-8)}


def rho_spectrum(rows: Sequence[Row], leave_out: int = 0) -> float:
    values = np.linalg.svd(np.array(rows, dtype=np.float64), compute_uv=False)
    values = values[: max(1, len(values) - leave_out)]
    values = np.maximum(values, values[0] * 2.0**-24)
    m = len(values)
    return sum(1 / m * math.log((1 / m) / s) for s in values / values.sum())
