"""A diffusion that is queued before anybody looks at its error."""

from typing import Any

import pytest
import torch

from dist_obdsd.manifold import targets as manifold
from dist_obdsd.manifold.diffusion import Diffusion
from dist_obdsd.transfer import AsyncHostCopy
from tests import oracle
from tests.manifold.data import B, manifolds, unit_rows
from tests.shadow import Shadow

MANIFOLDS = manifolds()
ALL, SOME = slice(0, B), slice(2, 5)


def settings(**options: Any) -> Diffusion:
    return Diffusion(**{"target": "obdsd", "temperature": 0.1, "transition_temperature": 1.0, **options})


@pytest.mark.parametrize("rows", [ALL, SOME])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", MANIFOLDS)
def test_what_was_queued_unseen_is_the_target_or_not_used(
    monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype, rows: slice
) -> None:
    T_BD, used = MANIFOLDS[kind].to(dtype), {}
    solved = manifold._diffused
    for transition, omega in ((1.0, 0.5), (1.0, 0.99), (0.005, 0.9)):
        chosen = settings(transition_temperature=transition, omega=omega)
        with Shadow([T_BD]) as shadow:
            pending = manifold.start_async(T_BD, rows, chosen)
        assert pending is not None
        assert not shadow.found
        with monkeypatch.context() as patch:
            again: list[Any] = []
            patch.setattr(manifold, "_diffused", lambda *given, again=again: again.append(1) or solved(*given))
            solve = manifold.target_rows(T_BD, rows, chosen, pending=pending)
            used[transition, omega] = not again
        expected = oracle.target(
            T_BD.numpy(), target="obdsd", temperature=0.1, transition_temperature=transition, omega=omega,
            mask_self=False,
        )[rows]  # fmt: skip
        assert abs(solve.target_bB.double().numpy() - expected).sum(1).max() < (
            1e-9 if dtype == torch.float64 else 1e-4
        )
    # A walk that forgets slowly needs a solver; without that control nothing would show that errors are looked at.
    assert used[0.005, 0.9] == (kind in ("equal", "opposed") and dtype == torch.float32)


def test_at_the_usual_temperatures_the_look_is_all_that_is_left_to_do() -> None:
    T_BD, rows = unit_rows(5, 112, 32).float(), slice(0, 112)
    pending = manifold.start_async(T_BD, rows, settings())
    assert pending is not None
    assert manifold.target_rows(T_BD, rows, settings(), pending=pending) is pending.result
    for worst in (1.0, torch.nan):
        unsure = manifold.PendingTarget(pending.result, AsyncHostCopy(torch.tensor([worst])), pending.goal)
        assert manifold.target_rows(T_BD, rows, settings(), pending=unsure) is not pending.result


def test_with_a_memory_the_queued_target_is_cut_to_the_batch() -> None:
    T_nD = MANIFOLDS["ordinary"].double()
    T_BD, memory_MD = T_nD[:8], T_nD[8:]
    pending = manifold.start_async(T_BD, slice(0, 8), settings(), memory_MD)
    assert pending is not None
    one, other = (manifold.target_rows(T_BD, slice(0, 8), settings(), memory_MD, a) for a in (pending, None))
    assert one.target_bB.shape == (8, 8)
    assert (one.target_bB - other.target_bB).abs().max() < 1e-10


def test_where_nothing_can_be_queued_nothing_is() -> None:
    assert manifold.start_async(MANIFOLDS["ordinary"].float(), ALL, settings(memory_gib=1e-9)) is None
    assert manifold.can_start_async(112, 7168, settings())
    for size, chosen in (
        (112, settings(target="psd")),
        (112, settings(target="obdsd_symmetric")),
        (112, settings(solver="cg")),
        (32768, settings()),
    ):
        assert not manifold.can_start_async(112, size, chosen)


@pytest.mark.parametrize("omega", [0.0, 0.5])
def test_nan_embeddings_give_nan_targets_also_without_any_diffusion(omega: float) -> None:
    T_BD = MANIFOLDS["ordinary"].float()
    T_BD[3] = torch.nan
    for pending in (None, manifold.start_async(T_BD, ALL, settings(omega=omega))):
        assert manifold.target_rows(T_BD, ALL, settings(omega=omega), pending=pending).target_bB.isnan().any()
