"""Naive float64 references: one pair at a time, straight from the formulas, with no thought for speed or memory.

Losses are built from scalars of torch, so that autograd differentiates them by another road than the vectorised code;
targets are numpy with an explicit inverse.

Legend: B rows of the whole batch, C classes, D embedding dimension.
"""

import math

import numpy as np
import torch


def multi_similarity(
    E_BD: torch.Tensor, labels: list[int], *, alpha: float, beta: float, threshold: float, margin: float
) -> tuple[torch.Tensor, int]:
    """Sum over the anchors that keep a positive and a negative, and their number."""
    E_BD = E_BD.double()
    B = len(labels)
    total, count = (E_BD * 0).sum(), 0
    for i in range(B):
        S = [(E_BD[i] * E_BD[j]).sum() for j in range(B)]
        positives = [S[j] for j in range(B) if labels[j] == labels[i] and j != i]
        negatives = [S[j] for j in range(B) if labels[j] != labels[i]]
        kept_positives = [s for s in positives if negatives and s.item() < max(n.item() for n in negatives) + margin]
        kept_negatives = [s for s in negatives if positives and s.item() > min(p.item() for p in positives) - margin]
        if not kept_positives or not kept_negatives:
            continue
        count += 1
        above = sum((torch.exp(-alpha * (s - threshold)) for s in kept_positives), torch.zeros((), dtype=torch.double))
        below = sum((torch.exp(beta * (s - threshold)) for s in kept_negatives), torch.zeros((), dtype=torch.double))
        total = total + torch.log(1 + above) / alpha + torch.log(1 + below) / beta
    return total, count


def _zero(E_BD: torch.Tensor) -> torch.Tensor:
    return (E_BD * 0).sum()


def _distance(x_D: torch.Tensor, y_D: torch.Tensor) -> torch.Tensor:
    """Euclidean, with slope 0 where it is 0."""
    square = ((x_D - y_D) ** 2).sum()
    return square.sqrt() if square.item() > 0 else square


def _positives_negatives(labels: list[int], i: int) -> tuple[list[int], list[int]]:
    return (
        [j for j in range(len(labels)) if labels[j] == labels[i] and j != i],
        [j for j in range(len(labels)) if labels[j] != labels[i]],
    )


def contrastive(
    E_BD: torch.Tensor, labels: list[int], *, positive_margin: float, negative_margin: float
) -> dict[str, tuple[torch.Tensor, int]]:
    """Sum and number of the pairs that cost something, positive and negative."""
    E_BD = E_BD.double()
    costs: dict[str, list[torch.Tensor]] = {"ranking_positive": [], "ranking_negative": []}
    for i in range(len(labels)):
        positives, negatives = _positives_negatives(labels, i)
        costs["ranking_positive"] += [_distance(E_BD[i], E_BD[j]) - positive_margin for j in positives]
        costs["ranking_negative"] += [negative_margin - _distance(E_BD[i], E_BD[j]) for j in negatives]
    kept = {name: [c for c in all_of_them if c.item() > 0] for name, all_of_them in costs.items()}
    return {name: (sum(some, _zero(E_BD)), len(some)) for name, some in kept.items()}


def triplet(E_BD: torch.Tensor, labels: list[int], *, margin: float) -> tuple[torch.Tensor, int]:
    """Sum over all triplets with a semi-hard negative, and their number."""
    E_BD = E_BD.double()
    total, count = _zero(E_BD), 0
    for i in range(len(labels)):
        positives, negatives = _positives_negatives(labels, i)
        for p in positives:
            for n in negatives:
                near, far = ((E_BD[i] - E_BD[j]).square().sum() for j in (p, n))
                if near.item() < far.item() < near.item() + margin:
                    total, count = total + near - far + margin, count + 1
    return total, count


def sampling_weights(distances: list[float], D: int, *, cutoff: float, nonzero_cutoff: float) -> list[float]:
    """Unnormalised probabilities of negatives at these distances, 1 / q(d)."""
    clipped = [max(d, cutoff) for d in distances]
    q = [d ** (D - 2) * (1 - d * d / 4) ** ((D - 3) / 2) if d < 2 else 0.0 for d in clipped]
    return [1 / density if d < nonzero_cutoff else 0.0 for d, density in zip(distances, q, strict=True)]


def sampled_triplets(
    E_BD: torch.Tensor, labels: list[int], uniforms_BB: torch.Tensor, *, cutoff: float, nonzero_cutoff: float
) -> list[tuple[int, int, int | None]]:
    """Anchor, positive and the negative drawn for the two: where the cumulative weights pass uniforms_BB[a, p]."""
    B, D = E_BD.shape
    E_BD = E_BD.detach().double()
    triplets: list[tuple[int, int, int | None]] = []
    for i in range(B):
        positives, negatives = _positives_negatives(labels, i)
        weights = sampling_weights(
            [_distance(E_BD[i], E_BD[n]).item() for n in negatives], D, cutoff=cutoff, nonzero_cutoff=nonzero_cutoff
        )
        for p in positives:
            at, below, drawn = float(uniforms_BB[i, p]) * math.fsum(weights), 0.0, None
            for n, weight in zip(negatives, weights, strict=True):
                below += weight
                if drawn is None and below > at:
                    drawn = n
            triplets.append((i, p, drawn))
    return triplets


def margin(
    E_BD: torch.Tensor,
    labels: list[int],
    triplets: list[tuple[int, int, int | None]],
    beta_B: torch.Tensor,
    *,
    alpha: float,
    nu: float,
) -> tuple[torch.Tensor, int]:
    """Sum over the triplets, with each anchor's beta, and the number of hinges above 0."""
    E_BD = E_BD.double()
    total, count = _zero(E_BD) + _zero(beta_B), 0
    for a, p, n in triplets:
        hinges = [alpha + _distance(E_BD[a], E_BD[p]) - beta_B[a]]
        if n is not None:
            hinges.append(alpha + beta_B[a] - _distance(E_BD[a], E_BD[n]))
        kept = [hinge for hinge in hinges if hinge.item() > 0]
        total, count = total + sum(kept, nu * beta_B[a]), count + len(kept)
    return total, count


def proxy_anchor(
    E_BD: torch.Tensor, labels: list[int], proxies_CD: torch.Tensor, *, alpha: float, delta: float
) -> dict[str, tuple[torch.Tensor, int]]:
    """Sum over the proxies that have rows in the batch and their number; sum over all proxies and theirs."""
    E_BD = E_BD.double()
    positive, negative, present = _zero(E_BD) + _zero(proxies_CD), _zero(E_BD) + _zero(proxies_CD), 0
    for k in range(len(proxies_CD)):
        proxy_D = proxies_CD[k] / (proxies_CD[k] ** 2).sum().sqrt()
        own, other = torch.ones((), dtype=torch.double), torch.ones((), dtype=torch.double)
        for i, label in enumerate(labels):
            s = (E_BD[i] * proxy_D).sum()
            if label == k:
                own = own + torch.exp(-alpha * (s - delta))
            else:
                other = other + torch.exp(alpha * (s + delta))
        positive, negative = positive + own.log(), negative + other.log()
        present += k in labels
    return {"ranking_positive": (positive, present), "ranking_negative": (negative, len(proxies_CD))}


def kl(E_BD: torch.Tensor, target_BB: np.ndarray, temperature: float) -> torch.Tensor:
    """Sum over the B rows of KL(target || softmax(E E^T / temperature))."""
    E_BD = E_BD.double()
    B = len(target_BB)
    total = torch.zeros((), dtype=torch.double)
    for i in range(B):
        logits = [(E_BD[i] * E_BD[j]).sum() / temperature for j in range(B)]
        top = max(x.item() for x in logits)
        log_sum = top + torch.log(sum(((x - top).exp() for x in logits), torch.zeros((), dtype=torch.double)))
        for j in range(B):
            q = float(target_BB[i][j])
            if q > 0:
                total = total + q * (math.log(q) - (logits[j] - log_sum))
    return total


def softmax_row(logits: list[float]) -> list[float]:
    top = max(logits)
    exps = [math.exp(x - top) for x in logits]
    return [x / math.fsum(exps) for x in exps]


def target(
    T_BD: np.ndarray,
    *,
    target: str,
    temperature: float,
    transition_temperature: float,
    omega: float,
    mask_self: bool,
    neighbours: int | None = None,
    mutual: bool = False,
    clip: bool = False,
    power: float = 1.0,
) -> np.ndarray:
    """All B rows of a target, [B, B]."""
    T_BD = np.asarray(T_BD, dtype=np.float64)
    B = len(T_BD)
    if target == "uniform":
        return np.full((B, B), 1 / B)
    S = [[math.fsum(T_BD[i] * T_BD[j]) for j in range(B)] for i in range(B)]

    def distribution(scores: list[float], i: int) -> list[float]:
        return softmax_row([-math.inf if mask_self and j == i else scores[j] / temperature for j in range(B)])

    def near(i: int, j: int) -> bool:
        """Is j among the nearest of i? Those that tie with the last one are."""
        if neighbours is None:
            return True
        others = sorted((S[i][x] for x in range(B) if x != i), reverse=True)
        return S[i][j] >= others[min(neighbours, B - 1) - 1] - 1e-12

    def edge(i: int, j: int) -> bool:
        return i != j and (near(i, j) and near(j, i) if mutual else near(i, j) or near(j, i))

    def sharpened(i: int, j: int) -> float:
        s = max(S[i][j], 0.0) if clip or target == "obdsd_symmetric" else S[i][j]
        return s**power if power != 1 else s

    P = np.array([distribution(S[i], i) for i in range(B)])
    if target == "psd":
        return P
    isolated = [not any(edge(i, j) for j in range(B)) for i in range(B)]
    if target == "obdsd":
        A = [
            softmax_row([sharpened(i, j) / transition_temperature if edge(i, j) else -math.inf for j in range(B)])
            if not isolated[i]
            else [0.0] * B
            for i in range(B)
        ]
        Q = (1 - omega) * np.linalg.inv(np.eye(B) - omega * np.array(A)) @ P
        return np.array([P[i] if isolated[i] else Q[i] for i in range(B)])
    assert target == "obdsd_symmetric"
    S0 = [[sharpened(i, j) if edge(i, j) else 0.0 for j in range(B)] for i in range(B)]
    degree = [math.fsum(row) for row in S0]
    A = [[S0[i][j] / math.sqrt(degree[i] * degree[j]) if S0[i][j] > 0 else 0.0 for j in range(B)] for i in range(B)]
    F = (1 - omega) * np.linalg.inv(np.eye(B) - omega * np.array(A)) @ np.array(S)
    return np.array([P[i] if degree[i] == 0 else distribution(list(F[i]), i) for i in range(B)])
