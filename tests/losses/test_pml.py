"""Losses of pytorch-metric-learning by name: the same figures as the library's own, and clear refusals."""

import inspect
import warnings
from typing import Any

import pytest
import torch
from pytorch_metric_learning import losses, miners, regularizers

from dist_obdsd.errors import InputError, RunError
from dist_obdsd.losses.build import build_ranking
from dist_obdsd.losses.pml import ABSTRACT, REFUSED, PMLLoss
from tests.losses.data import CLASSES, LABELS, parts, ranking
from tests.manifold.data import B, D, unit_rows

NEEDS = {"RankedListLoss": {"margin": 0.4, "Tn": 1.0}}


def names(module: Any) -> list[str]:
    return [
        name for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, torch.nn.Module) and name not in ABSTRACT
    ]  # fmt: skip


def build(name: str, kwargs: dict[str, Any] | None = None, seed: int = 0, **more: Any) -> PMLLoss:
    loss = build_ranking(ranking(name, kwargs=kwargs or {}, **more), CLASSES, D, seed)
    assert isinstance(loss, PMLLoss)
    return loss


@pytest.mark.parametrize("name", [name for name in names(losses) if name not in REFUSED])
def test_every_loss_trains(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the histogram loss indexes in an old way
        loss = build(f"pml.{name}", NEEDS.get(name))
        for step in range(2):  # a loss that held on to a step's graph would fail in the second
            E_BD = unit_rows(step).float().requires_grad_()
            term = parts(loss, E_BD, LABELS["mixed"], seed=step)["ranking"]
            term.sum.backward()
            assert (term.sum.dtype, term.count.item()) == (torch.float32, 1)
            assert E_BD.grad.any()
            assert all(parameter.grad.isfinite().all() for parameter in loss.parameters())
        broken_BD = unit_rows(0).float()
        broken_BD[3, 1] = float("nan")
        assert parts(loss, broken_BD, LABELS["mixed"])["ranking"].sum.isnan()
        again = parts(loss, unit_rows(0).float(), LABELS["mixed"])["ranking"]
        assert again.sum.isfinite()  # what it remembers was not spoiled


@pytest.mark.parametrize("name", [name for name in names(miners) if name not in REFUSED])
def test_every_miner_works_and_draws_what_the_seed_says(name: str) -> None:
    loss, E_BD = build("pml.TripletMarginLoss", miner=f"pml.{name}").double(), unit_rows(0, spread=0.5)
    state = torch.get_rng_state()
    values = [parts(loss, E_BD, LABELS["mixed"], seed=seed)["ranking"].sum.item() for seed in (1, 1, 2, 3)]
    assert torch.equal(torch.get_rng_state(), state)
    assert values[0] == values[1]
    assert (len(set(values)) > 1) == (name in ("DistanceWeightedMiner", "UniformHistogramMiner"))


CASES: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "pml.ArcFaceLoss": ({"margin": 20.0}, lambda: losses.ArcFaceLoss(CLASSES, D, margin=20.0), None),
    "pml.CircleLoss": (
        {"embedding_regularizer": "pml.LpRegularizer", "embedding_reg_weight": 0.5},
        lambda: losses.CircleLoss(embedding_regularizer=regularizers.LpRegularizer(), embedding_reg_weight=0.5), None,
    ),
    "pml.MultiSimilarityLoss": ({"beta": 40}, lambda: losses.MultiSimilarityLoss(beta=40), miners.MultiSimilarityMiner),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_figures_are_the_librarys_own(name: str) -> None:
    kwargs, make, miner = CASES[name]
    ours = build(name, kwargs, miner=None if miner is None else f"pml.{miner.__name__}").double()
    theirs = make().double()
    with torch.no_grad():
        for mine, other in zip(ours.loss.parameters(), theirs.parameters(), strict=True):
            other.copy_(mine)
    E_BD, labels_B = unit_rows(0).requires_grad_(), torch.tensor(LABELS["mixed"])
    pairs = None if miner is None else miner()(E_BD, labels_B)
    expected = torch.autograd.grad(theirs(E_BD, labels_B, pairs), [E_BD, *theirs.parameters()])
    for rows in (slice(0, B), slice(4, 8)):  # every rank holds the whole loss, whatever its rows
        term = parts(ours, E_BD, LABELS["mixed"], rows)["ranking"]
        got = torch.autograd.grad(term.sum / term.count, [E_BD, *ours.parameters()])
        assert all((mine - other).abs().max() < 1e-13 for mine, other in zip(got, expected, strict=True))
        assert expected[0].abs().max() > 1e-3


def test_what_a_loss_remembers_is_in_its_state() -> None:
    # Its histogram is a running mean over the steps, so a resumed run needs it.
    loss, resumed = build("pml.DynamicSoftMarginLoss").double(), build("pml.DynamicSoftMarginLoss").double()
    for step in range(3):
        parts(loss, unit_rows(step), LABELS["mixed"])
    fresh = parts(resumed, unit_rows(3), LABELS["mixed"])["ranking"].sum.item()
    resumed.load_state_dict(loss.state_dict())
    expected = parts(loss, unit_rows(3), LABELS["mixed"])["ranking"].sum.item()
    assert parts(resumed, unit_rows(3), LABELS["mixed"])["ranking"].sum.item() == expected
    assert fresh != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("ArcfaceLos", {}, "ranking.name is pml.ArcfaceLos, which .* its losses; did you mean pml.ArcFaceLoss"),
        ("SupConLoss", {"miner": "pml.TripletMarginMinr"}, "miner is .* did you mean pml.TripletMarginMiner"),
        ("ArcFaceLoss", {"kwargs": {"scal": 3}}, "ranking.kwargs: pml.ArcFaceLoss cannot be made of .*'scal'"),
        ("SupConLoss", {"miner": "pml.TripletMarginMiner", "miner_kwargs": {"margn": 1}}, "miner_kwargs: .*'margn'"),
        ("TripletMarginLoss", {"kwargs": {"distance": "pml.CosinSimilarity"}}, "kwargs.distance is .* pml.CosineSim"),
        ("SupConLoss", {"miner_kwargs": {"margin": 1}}, "miner_kwargs are given without a miner"),
        ("InstanceLoss", {"miner": "pml.BatchHardMiner"}, "with BatchHardMiner does not work with .*: ValueError: ind"),
        ("TripletMarginLoss", {"kwargs": {"margin": "wide"}}, "does not work with these settings"),
    ],
)
def test_what_cannot_work_is_refused_before_the_training(name: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(f"pml.{name}", **more)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_names_exist_and_are_refused(name: str) -> None:
    assert hasattr(losses, name) != hasattr(miners, name)
    given = {"name": f"pml.{name}"} if hasattr(losses, name) else {"name": "pml.SupConLoss", "miner": f"pml.{name}"}
    with pytest.raises(InputError, match=f"cannot work here: {REFUSED[name][:20]}"):
        build(**given)


def test_a_batch_that_the_library_refuses_is_a_run_error(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = build("pml.SupConLoss")

    def refuse(*_: Any) -> None:
        raise ValueError("not these")

    monkeypatch.setattr(loss.loss, "compute_loss", refuse)
    with pytest.raises(RunError, match=r"pml.SupConLoss refused a batch: not these"):
        parts(loss, unit_rows(0).float(), LABELS["mixed"])


def test_a_missing_library_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pytorch_metric_learning", None)
    monkeypatch.delitem(__import__("sys").modules, "pytorch_metric_learning.losses", raising=False)
    with pytest.raises(InputError, match="pip install pytorch-metric-learning"):
        build("pml.SupConLoss")
