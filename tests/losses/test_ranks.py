"""Every kind of ranking loss on real process groups: W processes give the loss and the gradients of one.

Legend: b rows of a rank, B rows of the batch, F features.
"""

from typing import Any

import numpy as np
import pytest
import torch

from dist_obdsd.config.ranking import RankingConfig
from dist_obdsd.distributed import collectives
from dist_obdsd.losses.proxy_anchor import ProxyAnchorLoss
from tests import harness
from tests.losses.data import BATCHES, Embedder, backward, images, loss_of, own_rows, patched, ranking, relative_error
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


def worker(name: str, way: str = "exact") -> dict[str, Any]:
    answers, own = {}, own_rows()
    for kind, labels in BATCHES.items():
        student, ranking_loss = Embedder(0), loss_of(SETTINGS[name], D)
        ranking_loss.calls = SEED + (way == "own draws") * collectives.rank()  # of the draws
        with patched("exact" if way == "own draws" else way):
            loss = ranking_loss(student(images()[own]), torch.tensor(labels)[own])
        answers[kind] = backward(loss, student, ranking_loss.parameters())
    return answers


@pytest.mark.parametrize(
    ("world", "name"),
    [(W, name) for name, chosen in SETTINGS.items() for W in harness.MORE_WORLD_SIZES if W == 3 or type(chosen) in OWN],
)
def test_loss_and_gradients_are_those_of_one_process(world: int, name: str) -> None:
    one = worker(name)  # here, without a process group
    assert np.linalg.norm(one["uneven"]["gradient"]) > 1e-2
    learnable = len(list(loss_of(SETTINGS[name], D).parameters())) > 0
    assert (np.linalg.norm(one["uneven"]["parameters"]) > 1e-3) == learnable
    for answers in harness.run(world, worker, name):
        for kind, expected in one.items():
            assert answers[kind]["loss"] == pytest.approx(expected["loss"], rel=1e-10, abs=1e-12)
            for of in ("gradient", "parameters"):
                assert relative_error(answers[kind][of], expected[of], 1e-3) < 1e-10


WRONG = {
    "no gradient": list(SETTINGS),
    "mean of rank means": ["multi-similarity", "contrastive", "triplet", "margin"],
    "own draws": ["margin", "margin, released", "MarginLoss, mined"],
}
"""What is done otherwise, and the losses that it spoils."""


@pytest.mark.parametrize(("way", "name"), [(way, name) for way, names in WRONG.items() for name in names])
def test_a_shortcut_is_measurably_wrong(way: str, name: str) -> None:
    expected, answer = worker(name)["uneven"], harness.run(3, worker, name, way)[0]["uneven"]
    assert relative_error(answer["gradient"], expected["gradient"]) > 1e-2
    if way == "no gradient":  # which the loss does not show
        assert answer["loss"] == pytest.approx(expected["loss"], rel=1e-10)
    if way == "mean of rank means":
        assert abs(answer["mean"] - expected["loss"]) > 1e-4


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
