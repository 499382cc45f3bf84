"""How long an evaluation takes beside plain Python, on one thread: ``python -m tests.evaluation.speed [NOISE]``.

13,180 x 128 embeddings in 659 classes of 20, as Omniglot has them; NOISE is how far a class is spread. The plain
evaluation takes the metrics one by one and the queries one by one, each metric with the faiss search that it needs.
CPU seconds, so that other work on the machine counts less.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import torch
from sklearn.metrics import normalized_mutual_info_score

from dist_obdsd.config import EvaluationConfig
from dist_obdsd.evaluation.evaluator import measure

C, PER_CLASS, D = 659, 20, 128
KS = (1, 2, 4, 8)


def embeddings(noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(C).repeat_interleave(PER_CLASS)
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(C, D, generator=random)[labels] + noise * torch.randn(C * PER_CLASS, D, generator=random)
    return torch.nn.functional.normalize(rows), labels


def plain(rows: np.ndarray, labels: np.ndarray) -> dict[str, Callable[[], Any]]:
    queries = range(len(rows))

    def search(k: int) -> np.ndarray:
        index = faiss.IndexFlatL2(D)
        index.add(rows)
        found = index.search(rows, k + 1)[1].tolist()
        return np.array([[i for i in near if i != query][:k] for query, near in zip(queries, found, strict=True)])

    def average_precision(k: int) -> float:
        near, total = search(k), 0.0
        for query in queries:
            relevant = labels[near[query]] == labels[query]
            total += (np.cumsum(relevant) / np.arange(1, k + 1) * relevant).sum() / (PER_CLASS - 1)
        return total / len(rows)

    def recall() -> list[float]:
        near = search(max(KS))
        return [sum(labels[query] in labels[near[query, :k]] for query in queries) / len(rows) for k in KS]

    def clustering() -> tuple[float, float]:
        k_means = faiss.Clustering(D, C)
        k_means.niter, k_means.min_points_per_centroid, k_means.max_points_per_centroid = 20, 1, 10**9
        k_means.train(rows, faiss.IndexFlatL2(D))
        index = faiss.IndexFlatL2(D)
        index.add(faiss.vector_float_to_array(k_means.centroids).reshape(C, D))
        clusters = index.search(rows, 1)[1][:, 0]

        def pairs(groups: np.ndarray) -> int:
            return sum(int(n) * (int(n) - 1) // 2 for n in (sum(groups == g) for g in np.unique(groups)))

        right = sum(pairs(clusters[labels == c]) for c in range(C))
        return normalized_mutual_info_score(labels, clusters), 2 * right / (pairs(labels) + pairs(clusters))

    return {
        "recall": recall,
        "map@r": lambda: average_precision(PER_CLASS - 1),
        "map@1000": lambda: average_precision(1000),
        "nmi, f1": clustering,
    }


def seconds(run: Callable[[], Any]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def main(noise: float = 1.5) -> None:
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    rows, labels = embeddings(noise)
    settings = EvaluationConfig(metrics=("recall", "map@r", "map@1000", "nmi", "f1"), recall_at=KS)
    n = len(rows)
    for _ in range(3):
        slow = {name: seconds(run) for name, run in plain(rows.numpy(), labels.numpy()).items()}
        fast = seconds(
            lambda: measure(
                rows, torch.arange(n), labels, ["both"] * n, expected_count=n, config=settings,
                device=torch.device("cpu"),
            )
        )  # fmt: skip
        total = sum(slow.values())
        parts = ", ".join(f"{name} {value:.2f}" for name, value in slow.items())
        print(f"plain {total:.2f} s ({parts}); measure {fast:.2f} s; ratio {fast / total:.2f}")


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
