"""Chunks against the whole batch. On several ranks, under each strategy: test_train_step and test_fsdp."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from dist_obdsd.training.grad_cache import GradCache


def loss(E_bD: torch.Tensor) -> torch.Tensor:
    """Ties every row to every other one."""
    E_bD = functional.normalize(E_bD, dim=1)
    return (E_bD @ E_bD.T).exp().sum(1).log().sum()


@pytest.mark.parametrize("chunk", [1, 3, 4, 11])
def test_the_gradient_is_that_of_the_whole_batch(chunk):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    images_b = torch.randn(11, 6, dtype=torch.float64)
    expected = torch.autograd.grad(loss(net(images_b)), list(net.parameters()))
    cached = GradCache(net, images_b, chunk)
    loss(cached.E_bD).backward()
    assert all(p.grad is None for p in net.parameters())  # the loss's backward ends at the embeddings
    cached.backward(net)
    for p, gradient in zip(net.parameters(), expected, strict=True):
        assert (p.grad - gradient).abs().max() < 1e-13
        assert gradient.abs().max() > 1e-4
