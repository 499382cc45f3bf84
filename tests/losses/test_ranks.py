"""Every kind of ranking loss on real process groups: W processes give the loss and the gradients of one.

Legend: b rows of a rank, B rows of the batch, F features.
"""

from typing import Any

import numpy as np
import pytest
import torch

from dist_obdsd.config.ranking import RankingConfig
from dist_obdsd.distributed import collectives
from dist_obdsd.losses.base import RankingLoss
from dist_obdsd.losses.batch_view import BatchView
from dist_obdsd.losses.proxy_anchor import ProxyAnchorLoss
from tests import harness
from tests.losses.data import BATCHES, Embedder, flat, images, loss_of, mean_gradient, own_rows, ranking, relative_error
from tests.manifold.data import unit_rows

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


def value(E_bD: torch.Tensor, loss: RankingLoss, labels: list[int], wrong: str) -> torch.Tensor:
    """Compute the global loss; or ``wrong``, by a gather without gradient, own counts or a rank's own seed."""
    if not wrong:
        loss.calls = SEED - 1  # of the draws
        return loss(E_bD, torch.tensor(labels)[own_rows()])
    W, rank, E_BD = collectives.world_size(), collectives.rank(), collectives.gather_rows(E_bD)
    if wrong == "gradient":
        E_BD = E_BD.detach().clone()
        E_BD[own_rows()] = E_bD
    view = BatchView(E_BD[own_rows()], E_BD, torch.tensor(labels), own_rows().start, SEED + rank * (wrong == "seed"))
    terms = loss.partial_means(view).values()
    counts = [t.count * W if wrong == "count" else collectives.sum_across(t.count) for t in terms]
    return sum((t.sum * W / count.clamp(min=1) for t, count in zip(terms, counts, strict=True)), torch.zeros(()))


def worker(name: str, wrong: str = "") -> dict[str, Any]:
    """For each batch: loss, DDP's gradient of the embedder, and the gradient of the loss's own parameters."""
    answers = {}
    for kind, labels in BATCHES.items():
        student, ranking_loss = Embedder(0), loss_of(SETTINGS[name], D)
        loss = value(student(images()[own_rows()]), ranking_loss, labels, wrong)
        loss.backward()
        answers[kind] = {
            "loss": collectives.sum_across(loss).item() / collectives.world_size(),
            "embedder": mean_gradient(student),
            "parameters": flat(p.grad for p in ranking_loss.parameters()),
        }
    return answers


@pytest.mark.parametrize(
    ("world", "name"),
    [(W, name) for name, chosen in SETTINGS.items() for W in harness.MORE_WORLD_SIZES if W == 3 or type(chosen) in OWN],
)
def test_loss_and_gradients_are_those_of_one_process(world: int, name: str) -> None:
    one = worker(name)  # here, without a process group
    assert np.linalg.norm(one["uneven"]["embedder"]) > 1e-2
    learnable = len(list(loss_of(SETTINGS[name], D).parameters())) > 0
    assert (np.linalg.norm(one["uneven"]["parameters"]) > 1e-3) == learnable
    for answers in harness.run(world, worker, name):
        for kind, expected in one.items():
            assert answers[kind]["loss"] == pytest.approx(expected["loss"], rel=1e-10, abs=1e-12)
            for of in ("embedder", "parameters"):
                assert relative_error(answers[kind][of], expected[of], 1e-3) < 1e-10


@pytest.mark.parametrize(
    ("wrong", "name"),
    [("gradient", name) for name in SETTINGS]
    + [("count", name) for name in ("multi-similarity", "contrastive", "triplet", "margin")]
    + [("seed", name) for name in ("margin", "margin, released", "MarginLoss, mined")],
)
def test_the_usual_shortcuts_are_measurably_wrong(wrong: str, name: str) -> None:
    expected, answer = worker(name)["uneven"], harness.run(3, worker, name, wrong)[0]["uneven"]
    assert relative_error(answer["embedder"], expected["embedder"]) > 1e-2
    if wrong == "gradient":
        assert answer["loss"] == pytest.approx(expected["loss"], rel=1e-10)  # the loss does not show it
    if wrong == "count":
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
