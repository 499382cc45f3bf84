import copy

import pytest
import torch

from dist_obdsd.config.sections import OptimConfig
from dist_obdsd.models.embedder import build_embedder
from dist_obdsd.training.optimizers import build_optimizer, learning_rate, load_state_by_name, state_by_name
from tests.training.test_train_step import settings

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def convolution(layout: torch.memory_format = torch.contiguous_format) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Conv2d(3, 4, 3, dtype=torch.float64).to(memory_format=layout)


def train(net: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        net(IMAGES).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["flat", "channels last"])
@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_state_by_name_continues_in_any_layout(name, layout):
    """ZeRO keeps flat rows; a run that goes on under DDP has the channels innermost."""
    config = OptimConfig(name=name, lr=0.1)
    first, second, unstated = convolution(), convolution(layout), convolution()
    before = build_optimizer(config, first.named_parameters())
    train(first, before, 3)
    second.load_state_dict(first.state_dict())
    unstated.load_state_dict(first.state_dict())
    after = build_optimizer(config, second.named_parameters())
    kept = copy.deepcopy(state_by_name(before, first.named_parameters()))
    load_state_by_name(after, second.named_parameters(), kept)
    train(first, before, 3)
    train(second, after, 3)
    flat = layout == torch.contiguous_format
    assert (second.weight.stride() == first.weight.stride()) == flat
    assert torch.allclose(first.weight, second.weight, rtol=0, atol=0 if flat else 1e-13)
    # The control: without the state, the weights differ.
    train(unstated, build_optimizer(config, unstated.named_parameters()), 3)
    assert not torch.allclose(first.weight, unstated.weight, atol=1e-6)


def test_learning_rates():
    step = OptimConfig(lr=1.0, schedule="step", milestones=(2, 3), gamma=0.5)
    assert [learning_rate(step, epoch, 4, 0.9, 100) for epoch in range(4)] == [1, 1, 0.5, 0.25]
    cosine = OptimConfig(lr=1.0, schedule="cosine")
    assert learning_rate(cosine, 0, 4, 0.0, 0) == 1
    assert learning_rate(cosine, 1, 2, 0.0, 9) == pytest.approx(0.5)
    assert learning_rate(cosine, 1, 2, 0.999, 9) < 1e-5
    warm = OptimConfig(lr=1.0, warmup_steps=4)
    assert [learning_rate(warm, 0, 4, 0.0, n) for n in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]


def test_layer_decay_lowers_the_rates_towards_the_input(caplog):
    vit = ("model.backbone=timm/vit_tiny_patch16_224", "data.image_size=32")
    config = settings(*vit, "optim.layer_decay=0.5", "optim.head_scale=10")
    student = build_embedder(config, torch.device("cpu"))
    caplog.set_level("INFO")
    depths, parameters = student.layer_depths(), dict(student.named_parameters())
    optimizer = build_optimizer(config.optim, parameters.items(), depths)
    scales = {p: group["scale"] for group in optimizer.param_groups for p in group["params"]}
    for name, wanted in {
        "trunk.cls_token": 0.5**13, "trunk.pos_embed": 0.5**13, "trunk.patch_embed.proj.weight": 0.5**13,
        "trunk.blocks.0.attn.qkv.weight": 0.5**12, "trunk.blocks.11.mlp.fc2.bias": 0.5, "trunk.norm.weight": 0.5,
        "head.weight": 10, "head.bias": 10,
    }.items():  # fmt: skip
        assert scales[parameters[name]] == wanted, name
    assert len(optimizer.param_groups) == 14  # the stem, 12 blocks, the embedding layer
    assert "0.000122, 0.000244" in caplog.text
    # The control: without decay there are two rates.
    plain = build_optimizer(config.optim.model_copy(update={"layer_decay": 1.0}), parameters.items(), depths)
    assert {group["scale"] for group in plain.param_groups} == {1.0, 10.0}
