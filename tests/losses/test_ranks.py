"""Every kind of ranking loss on real process groups: W processes give the loss and the gradients of one.

Legend: b rows of a rank, B rows of the batch, F features.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dist_obdsd.config.ranking import RankingConfig
from dist_obdsd.distributed import collectives
from dist_obdsd.losses.base import RankingLoss
from dist_obdsd.losses.batch_view import BatchView
from dist_obdsd.losses.proxy_anchor import ProxyAnchorLoss
from tests import harness
from tests.losses.data import Embedder, images, loss_of, mean_gradient, own_rows, ranking
from tests.manifold.data import B, unit_rows

D, SEED = 5, 11
SETTINGS: dict[str, RankingConfig] = {
    "multi-similarity": ranking("multi_similarity"),
    "contrastive": ranking("contrastive", negative_margin=1.4),
    "triplet": ranking("triplet", margin=0.7),
    "margin": ranking("margin", nu=0.1),
    "margin, released": ranking("margin", nu=0.1, alpha=0.6, conventions="released"),
    "proxy anchor": ranking("proxy_anchor", alpha=8.0),
    "ProxyNCA": ranking("pml.ProxyNCALoss", kwargs={"softmax_scale": 3}),
    "ArcFace": ranking("pml.ArcFaceLoss", kwargs={"scale": 8}),
    "SoftTriple": ranking("pml.SoftTripleLoss", kwargs={"centers_per_class": 2}),
    "FastAP": ranking("pml.FastAPLoss"),
    "MarginLoss, mined": ranking("pml.MarginLoss", kwargs={"learn_beta": True}, miner="pml.DistanceWeightedMiner"),
}
OWN = [type(chosen) for chosen in SETTINGS.values() if not chosen.name.startswith("pml.")]
"""Those whose ranks share the work; of the others every rank computes the whole batch's loss."""
LABELS = {
    "uneven": [0, 0, 0, 1, 2, 1, 3, 4, 5, 6, 3, 2],
    "a rank without an anchor": [0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 7, 8],
    "no anchor": list(range(B)),
}


def exact(student: nn.Module, loss: RankingLoss, labels: list[int]) -> torch.Tensor:
    loss.calls = SEED - 1  # of the draws
    return loss(student(images()[own_rows()]), torch.tensor(labels)[own_rows()])


def gather_without_gradient(student: nn.Module, loss: RankingLoss, labels: list[int]) -> torch.Tensor:
    def gather(x_b: torch.Tensor) -> torch.Tensor:
        parts = list(collectives.gather_rows(x_b.detach()).split(len(x_b)))
        parts[collectives.rank()] = x_b
        return torch.cat(parts)

    return rank_loss(student, loss, labels, gather=gather)


def mean_of_rank_means(student: nn.Module, loss: RankingLoss, labels: list[int]) -> torch.Tensor:
    return rank_loss(student, loss, labels, count=lambda count: count * collectives.world_size())


def a_seed_of_its_own(student: nn.Module, loss: RankingLoss, labels: list[int]) -> torch.Tensor:
    return rank_loss(student, loss, labels, seed=SEED + collectives.rank())


def rank_loss(
    student: nn.Module,
    loss: RankingLoss,
    labels: list[int],
    gather: Callable[[torch.Tensor], torch.Tensor] = collectives.gather_rows,
    count: Callable[[torch.Tensor], torch.Tensor] = collectives.sum_across,
    seed: int = SEED,
) -> torch.Tensor:
    E_bD = student(images()[own_rows()])
    view = BatchView(E_bD, gather(E_bD), torch.tensor(labels), own_rows().start, seed)
    return sum(
        (t.sum * collectives.world_size() / count(t.count).clamp(min=1) for t in loss.partial_means(view).values()),
        torch.zeros((), dtype=torch.float64),
    )


Way = Callable[[nn.Module, RankingLoss, list[int]], torch.Tensor]


def worker(way: Way, name: str) -> dict[str, Any]:
    """For each batch: loss, DDP's gradient of the embedder, and the gradient of the loss's own parameters."""
    answers = {}
    for kind, labels in LABELS.items():
        student, ranking_loss = Embedder(0), loss_of(SETTINGS[name], D)
        loss = way(student, ranking_loss, labels)
        loss.backward()
        own = [p.grad.numpy().ravel() for p in ranking_loss.parameters()]
        answers[kind] = {
            "loss": collectives.sum_across(loss).item() / collectives.world_size(),
            "embedder": np.concatenate([gradient.ravel() for gradient in mean_gradient(student)]),
            "parameters": np.concatenate([np.zeros(0), *own]),
        }
    return answers


def error(answer: dict[str, Any], expected: dict[str, Any], of: str) -> float:
    return float(np.linalg.norm(answer[of] - expected[of]) / max(np.linalg.norm(expected[of]), 1e-3))


@pytest.mark.parametrize(
    ("world", "name"),
    [(W, name) for name, chosen in SETTINGS.items() for W in harness.MORE_WORLD_SIZES if W == 3 or type(chosen) in OWN],
)
def test_loss_and_gradients_are_those_of_one_process(world: int, name: str) -> None:
    one = worker(exact, name)  # here, without a process group
    assert np.linalg.norm(one["uneven"]["embedder"]) > 1e-2
    learnable = len(list(loss_of(SETTINGS[name], D).parameters())) > 0
    assert (np.linalg.norm(one["uneven"]["parameters"]) > 1e-3) == learnable
    for answers in harness.run(world, worker, exact, name):
        for kind, expected in one.items():
            assert answers[kind]["loss"] == pytest.approx(expected["loss"], rel=1e-10, abs=1e-12)
            assert error(answers[kind], expected, "embedder") < 1e-10
            assert error(answers[kind], expected, "parameters") < 1e-10


@pytest.mark.parametrize(
    ("way", "name"),
    [(gather_without_gradient, name) for name in SETTINGS]
    + [(mean_of_rank_means, name) for name in ("multi-similarity", "contrastive", "triplet", "margin")]
    + [(a_seed_of_its_own, name) for name in ("margin", "margin, released", "MarginLoss, mined")],
)
def test_the_usual_shortcuts_are_measurably_wrong(way: Way, name: str) -> None:
    expected, answer = worker(exact, name)["uneven"], harness.run(3, worker, way, name)[0]["uneven"]
    assert error(answer, expected, "embedder") > 1e-2
    if way is gather_without_gradient:
        assert answer["loss"] == pytest.approx(expected["loss"], rel=1e-10)  # the loss does not show it
    if way is mean_of_rank_means:
        assert abs(answer["loss"] - expected["loss"]) > 1e-4


def apart_worker() -> list[float]:
    torch.manual_seed(torch.distributed.get_rank())
    loss = ProxyAnchorLoss(classes=3, embedding_dim=D).double()
    rows = slice(2 * torch.distributed.get_rank(), 2 * torch.distributed.get_rank() + 2)
    return [loss(unit_rows(0, 4, D)[rows], torch.tensor([0, 0, 1, 2])[rows]).item(), loss.proxies.sum().item()]


def test_ranks_that_began_with_other_proxies_take_those_of_rank_0() -> None:
    one, two = harness.run(2, apart_worker)
    torch.manual_seed(0)
    loss = ProxyAnchorLoss(classes=3, embedding_dim=D).double()
    expected = loss(unit_rows(0, 4, D), torch.tensor([0, 0, 1, 2])).item()
    assert one == two == [pytest.approx(expected, rel=1e-12), loss.proxies.sum().item()]
