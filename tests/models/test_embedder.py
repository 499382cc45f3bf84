import pytest
import torch
from torchvision import models

from dist_obdsd.config import Config, override_config, parse_config
from dist_obdsd.errors import InputError
from dist_obdsd.models.backbones import library_weights
from dist_obdsd.models.embedder import Embedder, build_embedder, log_batch_norm

CPU = torch.device("cpu")


def settings(*overrides: str) -> Config:
    raw = {"name": "x", "epochs": 2, "data": {"shards": "x"}, "model": {"embedding_dim": 16}}
    return parse_config(override_config(raw, overrides), "x")


def build(*overrides: str) -> Embedder:
    return build_embedder(settings(*overrides), CPU)


def noise(count: int, side: int, channels: int = 3) -> torch.Tensor:
    shape = (count, channels, side, side)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("pooling", ["avg", "max", "avg+max", "gem"])
def test_backbones_give_unit_rows_in_float32(pooling: str) -> None:
    net = build("model.backbone=squeezenet1_0", f"model.pooling={pooling}").eval()
    with torch.autocast("cpu", torch.bfloat16):
        E = net(noise(2, 64))
    assert (E.shape, E.dtype) == ((2, 16), torch.float32)
    assert torch.allclose(E.norm(dim=1), torch.ones(2), atol=1e-6)


def test_rows_do_not_depend_on_their_batch_mates() -> None:
    images, exact = noise(6, 32), "precision=float64"
    for backbone in ("small_cnn", "resnet18"):
        net = build(f"model.backbone={backbone}", exact).train()
        assert torch.allclose(net(images)[:2], net(images[:2]), atol=1e-13)
    # The control: per-rank batch statistics do tie them together.
    batch = build("model.backbone=resnet18", "model.norm=batch", exact).train()
    assert not torch.allclose(batch(images)[:2], batch(images[:2]), atol=1e-3)


@pytest.mark.parametrize("backbone", ["small_cnn", "squeezenet1_0"])
def test_the_layout_of_memory_changes_only_rounding(backbone: str) -> None:
    rows, gradients = [], []
    for layout in ("true", "false"):
        net = build(f"model.backbone={backbone}", f"model.channels_last={layout}", "precision=float64")
        E = net(noise(4, 64))
        weight = next(p for p in net.trunk.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1)
        assert weight.is_contiguous(memory_format=net.layout)
        (E * torch.arange(E.shape[1])).sum().backward()
        rows.append(E.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    assert torch.allclose(rows[0], rows[1], atol=1e-12, rtol=0)
    assert torch.allclose(gradients[0], gradients[1], atol=1e-9 * gradients[1].abs().max(), rtol=0)


def test_the_same_seed_gives_the_same_network_and_another_another() -> None:
    state = torch.get_rng_state()
    a, b, c = (build(f"seed={seed}", "model.backbone=small_cnn") for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a.head.weight, b.head.weight)
    assert not torch.equal(a.head.weight, c.head.weight)


def test_batch_statistics_that_depend_on_ranks_are_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    config = settings("model.backbone=resnet18", "model.norm=batch")
    log_batch_norm(build_embedder(config, CPU), config.model, 2)
    assert "depend on the number of ranks" in caplog.text
    with pytest.raises(InputError, match="set model.norm=frozen"):
        build("model.backbone=resnet18", "model.norm=sync")


def test_published_weights_are_chosen_by_name() -> None:
    kinds = models.ResNet50_Weights
    for name, entry in (("torchvision", kinds.IMAGENET1K_V2), ("torchvision:IMAGENET1K_V1", kinds.IMAGENET1K_V1)):
        assert library_weights("resnet50", name).entry is entry
    with pytest.raises(InputError, match="has IMAGENET1K_V1, IMAGENET1K_V2 for resnet50; give one of these"):
        library_weights("resnet50", "torchvision:V3")
