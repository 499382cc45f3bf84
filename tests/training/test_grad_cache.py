"""Chunks against the whole batch, with random numbers drawn in the network."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from dist_obdsd.training import grad_cache
from dist_obdsd.training.grad_cache import GradCache


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 8), nn.Dropout(0.3), nn.Linear(8, 4)]
    return nn.Sequential(*layers).double()


def loss(E_bD: torch.Tensor) -> torch.Tensor:
    """Ties every row to every other one."""
    E_bD = functional.normalize(E_bD, dim=1)
    return (E_bD @ E_bD.T).exp().sum(1).log().sum()


def gradients(net: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in net.parameters()]


def whole(images_b: torch.Tensor, chunk: int) -> list[torch.Tensor]:
    """One graph over all rows; the chunks only fix the order in which dropout draws."""
    net = network()
    torch.manual_seed(1)
    loss(torch.cat([net(images) for images in images_b.split(chunk)])).backward()
    return gradients(net)


def chunked(images_b: torch.Tensor, chunk: int) -> list[torch.Tensor]:
    net = network()
    torch.manual_seed(1)
    cached = GradCache(net, images_b, chunk)
    loss(cached.E_bD).backward()
    after = torch.get_rng_state()
    cached.backward(net)
    assert torch.equal(torch.get_rng_state(), after)  # the second pass leaves no trace
    return gradients(net)


@pytest.mark.parametrize("chunk", [1, 3, 4, 11])
def test_the_gradient_is_that_of_the_whole_batch(chunk):
    images_b = torch.randn(11, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for ours, theirs in zip(chunked(images_b, chunk), whole(images_b, chunk), strict=True):
        assert (ours - theirs).abs().max() < 1e-13
        assert theirs.abs().max() > 1e-4


def test_other_random_numbers_give_another_gradient(monkeypatch):
    images_b = torch.randn(11, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(grad_cache, "_set_random_state", lambda states, device: None)
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(chunked(images_b, 4), whole(images_b, 4), strict=True))
