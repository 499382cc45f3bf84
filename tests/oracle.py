"""The naive objective, straight from the formulas: a loop over anchors or pairs, and dense matrices with an inverse.

The tests compare with it in float64, the benchmarks and the GPU checks in the precision of what they give. Losses are
made of few torch operations, so that autograd differentiates them by another road than the vectorised code.

Legend: B rows of the whole batch, C classes, D embedding dimension.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def multi_similarity(
    E_BD: torch.Tensor, labels: Sequence[int] | torch.Tensor, *, alpha: float, beta: float, threshold: float,
    margin: float,
) -> tuple[torch.Tensor, int]:  # fmt: skip
    """Sum over the anchors that keep a positive and a negative, and their number."""
    E_BD = _widened(E_BD)
    labels_B, S_BB = torch.as_tensor(labels, device=E_BD.device), E_BD @ E_BD.T
    total, count = _zero(E_BD), 0
    for i in range(len(labels_B)):
        same_B = labels_B == labels_B[i]
        negatives = S_BB[i][~same_B]
        same_B[i] = False
        positives = S_BB[i][same_B]
        if not len(positives) or not len(negatives):
            continue
        kept_positives, kept_negatives = (
            positives[positives < negatives.max() + margin], negatives[negatives > positives.min() - margin]
        )  # fmt: skip
        if not len(kept_positives) or not len(kept_negatives):
            continue
        count += 1
        total = total + torch.log(1 + torch.exp(-alpha * (kept_positives - threshold)).sum()) / alpha
        total = total + torch.log(1 + torch.exp(beta * (kept_negatives - threshold)).sum()) / beta
    return total, count


def _widened(E_BD: torch.Tensor) -> torch.Tensor:
    return E_BD.double() if E_BD.dtype.itemsize < 4 else E_BD


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
    E_BD: torch.Tensor, labels: list[int], triplets: list[tuple[int, int, int | None]], beta_B: torch.Tensor, *,
    alpha: float, nu: float,
) -> tuple[torch.Tensor, int]:  # fmt: skip
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


def kl(E_BD: torch.Tensor, target_BB: np.ndarray | torch.Tensor, temperature: float) -> torch.Tensor:
    """Sum over the B rows of KL(target || softmax(E E^T / temperature))."""
    E_BD = _widened(E_BD)
    target_BB = torch.as_tensor(target_BB, dtype=E_BD.dtype)
    log_p_BB = (E_BD @ E_BD.T / temperature).log_softmax(1)
    return (torch.xlogy(target_BB, target_BB) - target_BB * log_p_BB).sum()


def target(
    T_BD: Any, *, target: str, temperature: float, transition_temperature: float, omega: float, mask_self: bool = False,
    neighbours: int | None = None, mutual: bool = False, clip: bool = False, power: float = 1.0,
) -> Any:  # fmt: skip
    """All B rows of a target, [B, B]: an array where an array is given, which is taken in float64, else a tensor."""
    is_array = isinstance(T_BD, np.ndarray)
    T_BD = torch.from_numpy(T_BD).double() if is_array else T_BD
    B, S_BB = len(T_BD), T_BD @ T_BD.T
    eye_BB = torch.eye(B, dtype=T_BD.dtype, device=T_BD.device)
    self_BB = eye_BB.bool()
    hidden_BB = self_BB & mask_self

    def softmax(S: torch.Tensor, left_out: torch.Tensor, t: float) -> torch.Tensor:
        return (S / t).masked_fill(left_out, -math.inf).softmax(1).nan_to_num(0)

    edge_BB = ~self_BB
    if neighbours is not None:  # those that tie with the last one are near, too
        others_BB = S_BB.masked_fill(self_BB, -math.inf).sort(1, descending=True).values
        near_BB = others_BB[:, min(neighbours, B - 1) - 1, None] - 1e-12 <= S_BB
        edge_BB &= near_BB & near_BB.T if mutual else near_BB | near_BB.T
    sharp_BB = S_BB.clamp_min(0) if clip or target == "obdsd_symmetric" else S_BB
    sharp_BB = sharp_BB**power if power != 1 else sharp_BB
    P_BB = softmax(S_BB, hidden_BB, temperature)
    match target:
        case "uniform":
            found_BB = torch.full_like(S_BB, 1 / B)
        case "psd":
            found_BB = P_BB
        case "obdsd":
            A_BB = softmax(sharp_BB, ~edge_BB, transition_temperature)
            F_BB = (1 - omega) * torch.linalg.inv(eye_BB - omega * A_BB) @ P_BB
            found_BB = torch.where(edge_BB.any(1)[:, None], F_BB, P_BB)
        case "obdsd_symmetric":
            S0_BB = torch.where(edge_BB, sharp_BB, 0)
            degree_B = S0_BB.sum(1)
            A_BB = (S0_BB / (degree_B[:, None] * degree_B).sqrt()).nan_to_num(0)
            F_BB = (1 - omega) * torch.linalg.inv(eye_BB - omega * A_BB) @ S_BB
            found_BB = torch.where(degree_B[:, None] == 0, P_BB, softmax(F_BB, hidden_BB, temperature))
    return found_BB.numpy() if is_array else found_BB
