"""Retrieval the slow and obvious way: Python floats (which are float64), double loops, nothing of the package."""

from collections.abc import Sequence


def score(a: Sequence[float], b: Sequence[float]) -> float:
    total = 0.0
    for x, y in zip(a, b, strict=True):
        total += x * y
    return total


def nearest(
    queries: Sequence[Sequence[float]],
    query_ids: Sequence[int],
    gallery: Sequence[Sequence[float]],
    gallery_ids: Sequence[int],
    k: int,
    exclude_self: bool = True,
) -> dict[int, list[tuple[float, int]]]:
    """Query id -> its k best (score, id), ties by the smaller id."""
    found = {}
    for query, query_id in zip(queries, query_ids, strict=True):
        ranked = sorted(
            (-score(query, row), row_id)
            for row, row_id in zip(gallery, gallery_ids, strict=True)
            if not (exclude_self and row_id == query_id)
        )
        found[query_id] = [(-negated, row_id) for negated, row_id in ranked[:k]]
    return found


def recall(relevant: Sequence[bool], k: int) -> float:
    for place in range(k):
        if relevant[place]:
            return 1.0
    return 0.0


def average_precision_at_r(relevant: Sequence[bool], r: int) -> float:
    total = 0.0
    for i in range(1, r + 1):
        if relevant[i - 1]:
            total += sum(relevant[:i]) / i
    return total / r


def evaluate(
    rows: dict[int, Sequence[float]], labels: dict[int, int], roles: dict[int, str], recall_at: Sequence[int]
) -> tuple[dict[str, float], int, int]:
    """(metrics, queries with a match, queries without one) for images given by id."""
    gallery = [i for i in rows if roles[i] in ("both", "gallery", "train")]
    values: dict[str, list[float]] = {f"recall@{k}": [] for k in recall_at} | {"map@r": []}
    excluded = 0
    for query in rows:
        if roles[query] not in ("both", "query", "train"):
            continue
        r = sum(labels[i] == labels[query] for i in gallery if i != query)
        if r == 0:
            excluded += 1
            continue
        everything = [rows[i] for i in gallery]
        found = nearest([rows[query]], [query], everything, gallery, len(gallery))[query]
        relevant = [labels[i] == labels[query] for _, i in found]
        for k in recall_at:
            values[f"recall@{k}"].append(recall(relevant, k))
        values["map@r"].append(average_precision_at_r(relevant, r))
    means = {name: sum(of_queries) / len(of_queries) for name, of_queries in values.items()}
    return means, len(values["map@r"]), excluded
