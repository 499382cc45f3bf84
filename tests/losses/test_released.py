"""Parity with the criteria of OBD-SD's released code, whose figures stand here as constants.

They come from github.com/ZelongZeng/OBD-SD_Pytorch at d62fa86, run in float64 on a CPU with torch 2.15.0 on the rows
below. What had to be patched there: ``.cuda()`` did nothing; ``multisimilarity_obd_sd.Criterion`` got the ``tau``
that its PSD branch reads and nobody sets (``kd_tau``); ``margin_obd_sd.Criterion`` got ``PSD``, ``OBDP``,
``kd_lambda``, ``kd_tau`` and ``diffusion_tau``, which its forward reads and nobody sets; its miner handed out the
triplets that ``MarginLoss`` draws here, since theirs come from NumPy's global generator.

Legend: B rows, D embedding dimension.
"""

import numpy as np
import pytest
import torch

from dist_obdsd import MarginLoss, MultiSimilarityLoss, OBDSDLoss
from dist_obdsd.losses.base import RankingLoss
from dist_obdsd.losses.batch_view import BatchView
from dist_obdsd.training.optimizers import build_objective_optimizer
from tests.gpu.rig import settings
from tests.losses.data import parts

LABELS_B = torch.arange(56).repeat_interleave(2)
CUB = {"weight": 1000.0, "omega": 0.3, "transition_temperature": 1.0}
CARS = {"weight": 75.0, "omega": 0.99, "transition_temperature": 1.0}
SOP = {"weight": 100.0, "omega": 0.5, "transition_temperature": 0.005}
SEED = 3
"""Of the triplets that the released criterion was given."""


def rows(seed: int, noise: float) -> torch.Tensor:
    """56 classes x 2, D = 128, from a generator that NumPy promises never to change."""
    draw = np.random.RandomState(seed)
    centres_BD = draw.standard_normal((56, 128)).repeat(2, 0)
    x_BD = centres_BD + noise * draw.standard_normal((112, 128))
    return torch.from_numpy(x_BD / np.linalg.norm(x_BD, axis=1, keepdims=True))


def objective(ranking: RankingLoss, target: str, settings: dict[str, float]) -> list[float]:
    """The loss at half the ramp, the norm of its gradient, and those of its sixth row and of the boundaries."""
    E_BD, loss = rows(0, 1.0).requires_grad_(), OBDSDLoss(ranking, target=target, temperature=1.0, **settings)
    value = loss(E_BD, LABELS_B, rows(1, 0.5), ramp=0.5, seed=SEED).loss
    grad_BD, *own = torch.autograd.grad(value, [E_BD, *ranking.parameters()])
    return [value.item(), grad_BD.norm().item(), *(grad.norm().item() for grad in own or [grad_BD[5]])]


@pytest.mark.parametrize(
    ("target", "settings", "released"),
    [
        ("obdsd", CUB, [3.381841956764498, 1.4803933523638986, 0.1287808740552866]),
        ("obdsd", CARS, [0.8193003417878043, 0.36376917488078553, 0.01748748138711953]),
        ("obdsd", SOP, [0.8166908273216327, 0.379384741664762, 0.011790171124954209]),
        ("psd", CUB, [4.369741141667104, 1.4153242483748432, 0.115651074788306]),
        ("none", CUB, [0.41178111619127994, 0.3389436046251211, 0.0]),
    ],
    ids=["cub200", "cars196", "sop", "psd", "none"],
)
def test_multi_similarity(target: str, settings: dict[str, float], released: list[float]) -> None:
    assert objective(MultiSimilarityLoss(), target, settings) == pytest.approx(released, rel=1e-5)


@pytest.mark.parametrize(
    ("nu", "target", "released"),
    [
        (0.0, "none", [0.12461170944673147, 0.1921875585176644, 0.09874559917399522]),
        (0.0, "obdsd", [3.0946725500199492, 1.4546054764387661, 0.09874559917399522]),
        (0.01, "obdsd", [4.438672651109426, 1.4546054764387661, 0.20556253481560238]),
    ],
)
def test_margin(nu: float, target: str, released: list[float]) -> None:
    loss = MarginLoss(nu=nu, conventions="released", classes=100).double()
    assert objective(loss, target, CUB) == pytest.approx(released, rel=1e-5)
    ordinary = MarginLoss(nu=nu, classes=100).double()
    assert objective(ordinary, target, CUB)[0] != pytest.approx(released[0], rel=1e-3)


def test_margin_draws_by_the_released_probabilities() -> None:
    E_BD = rows(0, 1.0)
    view = BatchView(E_BD, E_BD, LABELS_B, 0)
    loss = MarginLoss(conventions="released", classes=100)
    weight_BB, _ = loss.weights(torch.cdist(E_BD, E_BD), view.positives_negatives()[1], 128)
    chance_B = weight_BB[0] / weight_BB[0].sum()
    # inverse_sphere_distances of batchminer/distance.py for the first anchor: some, their mean place, their squares.
    assert chance_B[:4].tolist() == pytest.approx([0, 0, 0.0038065062520274188, 0.003180809310801834], rel=1e-5)
    assert (torch.arange(112.0).double() @ chance_B).item() == pytest.approx(73.14299112136733, rel=1e-5)
    assert chance_B.square().sum().item() == pytest.approx(0.10309865305463123, rel=1e-5)
    assert (torch.cdist(E_BD, E_BD)[0][chance_B > 0] >= 1.4).any()  # no upper cutoff


def test_margin_takes_one_positive_an_anchor_at_random() -> None:
    E_BD, labels = rows(0, 1.0)[:12], [0] * 6 + [1] * 5 + [2]
    loss = MarginLoss(alpha=5.0, conventions="released", classes=3).double()  # every hinge is above 0
    sums = {parts(loss, E_BD, labels, seed=seed)["ranking"].sum.item() for seed in range(8)}
    assert len(sums) == 8
    assert parts(loss, E_BD, labels)["ranking"].count.item() == 12  # triplets, the lone anchor's among them


def test_the_released_boundaries_have_a_rate_of_their_own() -> None:
    named = list(MarginLoss(classes=3).named_parameters())
    for more, rate in (([], 0.1), (["ranking.conventions=released"], 5e-4)):
        optimizer = build_objective_optimizer(settings("small_cnn", "ranking.name=margin", *more), named)
        assert optimizer is not None
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
