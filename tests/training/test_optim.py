import pytest
import torch

from dist_obdsd.config import Optim
from dist_obdsd.training.optim import build_optimizer, learning_rate, load_state_by_name, state_by_name


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))


def train(net: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        net(torch.full((5, 3), float(step))).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_state_by_name_continues_with_the_same_bits(name):
    settings = Optim(name=name, lr=0.1)
    unbroken, first, second = network(), network(), network()
    train(unbroken, build_optimizer(settings, unbroken.named_parameters()), range(6))
    before = build_optimizer(settings, first.named_parameters())
    train(first, before, range(3))
    second.load_state_dict(first.state_dict())
    after = build_optimizer(settings, second.named_parameters())
    load_state_by_name(after, second.named_parameters(), state_by_name(before, first.named_parameters()))
    train(second, after, range(3, 6))
    for a, b in zip(unbroken.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    # The control: without the state, the weights differ.
    train(first, build_optimizer(settings, first.named_parameters()), range(3, 6))
    assert not torch.equal(next(iter(unbroken.parameters())), next(iter(first.parameters())))


def test_learning_rates():
    step = Optim(lr=1.0, schedule="step", milestones=(2, 3), gamma=0.5)
    assert [learning_rate(step, epoch, 4, 0.9, 100) for epoch in range(4)] == [1, 1, 0.5, 0.25]
    cosine = Optim(lr=1.0, schedule="cosine")
    assert learning_rate(cosine, 0, 4, 0.0, 0) == 1
    assert learning_rate(cosine, 1, 2, 0.0, 9) == pytest.approx(0.5)
    assert learning_rate(cosine, 1, 2, 0.999, 9) < 1e-5
    warm = Optim(lr=1.0, warmup_steps=4)
    assert [learning_rate(warm, 0, 4, 0.0, n) for n in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
