"""A diffusion that is queued before anybody looks at its error."""

from typing import Any

import pytest
import torch

from dist_obdsd.manifold import targets as manifold
from dist_obdsd.manifold.diffusion import Diffusion
from dist_obdsd.manifold.targets import DiffusionTarget, QueuePlan
from tests import oracle
from tests.manifold.data import B, clustered, manifolds
from tests.shadow import Shadow

MANIFOLDS = manifolds()
ALL, SOME = slice(0, B), slice(2, 5)


def settings(**options: Any) -> Diffusion:
    return Diffusion(**{"target": "obdsd", "temperature": 0.1, "transition_temperature": 1.0, **options})


@pytest.mark.parametrize("target", ["obdsd", "obdsd_symmetric"])
@pytest.mark.parametrize("rows", [ALL, SOME])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["ordinary", "both", "equal"])
def test_what_was_queued_unseen_is_the_target(kind, dtype, rows, target):
    T_BD = MANIFOLDS[kind].to(dtype)
    for transition, omega in ((1.0, 0.5), (1.0, 0.99), (0.005, 0.9)):
        chosen, plan = settings(transition_temperature=transition, omega=omega, target=target), QueuePlan()
        same = {"target": target, "temperature": 0.1, "transition_temperature": transition, "omega": omega}
        expected_bB = torch.from_numpy(oracle.target(T_BD.numpy(), **same)[rows])
        for _ in range(3):  # the series, then what the first step taught
            with Shadow([T_BD]) as shadow:
                pending = manifold.start_async(T_BD, rows, chosen, None, plan)
            assert not shadow.found
            found_bB = manifold.target_rows(T_BD, rows, chosen, pending=pending).target_bB
            assert (found_bB - expected_bB).abs().sum(1).max() < (1e-9 if dtype == torch.float64 else 2e-4)


def take_steps(chosen: Diffusion, steps: int = 6, b: int = 112) -> tuple[list[int], QueuePlan, list[DiffusionTarget]]:
    """Solve for the batches of an epoch: how often the host waited in each, the plan, and the targets."""
    plan, waits, targets = QueuePlan(), [], []
    for step in range(steps):
        T_BD = clustered(step, likeness=0.3 + step % 3 / 4)
        with Shadow([T_BD]) as shadow:
            pending = manifold.start_async(T_BD, slice(0, b), chosen, None, plan)
            assert not shadow.found
            targets.append(manifold.target_rows(T_BD, slice(0, b), chosen, pending=pending))
        assert shadow.looks == 1
        waits.append(len(shadow.found))
    return waits, plan, targets


@pytest.mark.parametrize("target", ["obdsd", "obdsd_symmetric"])
@pytest.mark.parametrize("transition", [0.1, 0.005])
@pytest.mark.parametrize("b", [112, 14])
def test_at_sharp_temperatures_the_host_waits_in_one_step(target, transition, b):
    chosen = settings(target=target, transition_temperature=transition)
    waits, plan, targets = take_steps(chosen, b=b)
    assert sum(count > 0 for count in waits) <= 1
    assert plan.rejected
    if b == 112:  # by Cholesky, which is looked at once
        assert sum(waits) == 1
    for step, found in enumerate(targets):
        alone = manifold.target_rows(clustered(step, likeness=0.3 + step % 3 / 4), slice(0, b), chosen)
        assert float((found.target_bB - alone.target_bB).abs().sum(1).max()) < (1e-5 if b == 112 else 5e-5)
        assert float(found.error_b.max()) <= chosen.tolerance


def test_at_the_usual_temperatures_a_few_products_are_enough():
    for chosen in (settings(omega=0.3), settings(omega=0.99), settings(target="obdsd_symmetric", temperature=1.0)):
        waits, plan, targets = take_steps(chosen)
        assert sum(waits) == 0
        assert not plan.rejected
        assert targets[0].iterations > targets[1].iterations == targets[-1].iterations == plan.products


def test_a_rejected_series_is_tried_in_the_next_epoch():
    T_BD, rows = clustered(0), slice(0, 112)
    gentle, sharp = settings(), settings(transition_temperature=0.005)
    plan = QueuePlan(products=2)
    T_BD[5] = -T_BD.mean(0) / T_BD.mean(0).norm()
    manifold.target_rows(T_BD, rows, sharp, pending=manifold.start_async(T_BD, rows, sharp, None, plan))
    assert (plan.products, plan.rejected) == (None, False)  # longer ones were not tried
    manifold.target_rows(T_BD, rows, sharp, pending=manifold.start_async(T_BD, rows, sharp, None, plan))
    assert plan.rejected
    assert manifold.start_async(T_BD, rows, gentle, None, plan).result.iterations == 0  # Cholesky
    assert manifold.start_async(T_BD, rows, gentle, None, QueuePlan()).result.iterations > 0


def test_with_a_memory_the_queued_target_is_cut_to_the_batch():
    T_BD, memory_MD = MANIFOLDS["ordinary"].double().split([8, B - 8])
    pending = manifold.start_async(T_BD, slice(0, 8), settings(), memory_MD)
    one, other = (manifold.target_rows(T_BD, slice(0, 8), settings(), memory_MD, a) for a in (pending, None))
    assert one.target_bB.shape == (8, 8)
    assert (one.target_bB - other.target_bB).abs().max() < 1e-10


def test_where_nothing_can_be_queued_nothing_is(monkeypatch):
    assert manifold.start_async(MANIFOLDS["ordinary"].float(), ALL, settings(memory_gib=1e-9)) is None
    monkeypatch.setattr(manifold, "PART_ENTRIES", B * B - 1)
    assert manifold.start_async(MANIFOLDS["ordinary"].float(), ALL, settings()) is None


@pytest.mark.parametrize("omega", [0.0, 0.5])
def test_nan_embeddings_give_nan_targets_and_teach_nothing(omega):
    T_BD, plan = MANIFOLDS["ordinary"].float(), QueuePlan()
    T_BD[3] = torch.nan
    for pending in (None, manifold.start_async(T_BD, ALL, settings(omega=omega), None, plan)):
        assert manifold.target_rows(T_BD, ALL, settings(omega=omega), pending=pending).target_bB.isnan().any()
    assert not plan.rejected
