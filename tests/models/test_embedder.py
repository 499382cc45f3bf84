import pytest
import torch
from torchvision import models

from dist_obdsd.config import Config, override_config, parse_config
from dist_obdsd.errors import InputError
from dist_obdsd.models.backbones import library_weights
from dist_obdsd.models.embedder import build_embedder, log_batch_norm

CPU = torch.device("cpu")


def settings(*overrides: str) -> Config:
    raw = {"name": "x", "epochs": 2, "data": {"shards": "x"}, "model": {"embedding_dim": 16}}
    return parse_config(override_config(raw, overrides), "x")


def build(*overrides: str):
    return build_embedder(settings(*overrides), CPU)


@pytest.mark.parametrize("pooling", ["avg", "max", "avg+max", "gem"])
@pytest.mark.parametrize("backbone", ["resnet18", "squeezenet1_0"])
def test_backbones_give_unit_rows_in_float32(backbone, pooling):
    net = build(f"model.backbone={backbone}", f"model.pooling={pooling}").eval()
    with torch.autocast("cpu", torch.bfloat16):
        E = net(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
    assert E.shape == (2, 16)
    assert E.dtype == torch.float32
    assert torch.allclose(E.norm(dim=1), torch.ones(2), atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_small_cnn_in_float64(channels):
    net = build("model.backbone=small_cnn", f"data.channels={channels}", "data.mean=[0.5]", "data.std=[0.5]",
                "precision=float64")  # fmt: skip
    E = net(torch.randint(0, 256, (2, channels, 32, 32), dtype=torch.uint8))
    assert E.dtype == torch.float64
    assert torch.allclose(E.norm(dim=1), torch.ones(2, dtype=torch.float64), atol=1e-12)


def test_rows_do_not_depend_on_their_batch_mates():
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    net = build("model.backbone=small_cnn", "precision=float64").train()
    assert torch.allclose(net(images)[:2], net(images[:2]), atol=1e-13)
    frozen = build("model.backbone=resnet18", "precision=float64").train()
    assert torch.allclose(frozen(images)[:2], frozen(images[:2]), atol=1e-13)
    # The control: per-rank batch statistics do tie them together.
    batch = build("model.backbone=resnet18", "model.norm=batch", "precision=float64").train()
    assert not torch.allclose(batch(images)[:2], batch(images[:2]), atol=1e-3)


@pytest.mark.parametrize("backbone", ["small_cnn", "resnet18", "squeezenet1_0"])
def test_the_layout_of_memory_changes_only_rounding(backbone):
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rows, gradients = [], []
    for layout in ("true", "false"):
        net = build(f"model.backbone={backbone}", f"model.channels_last={layout}", "precision=float64")
        E = net(images)
        weight = next(p for p in net.trunk.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1)
        assert weight.is_contiguous(memory_format=net.layout)
        (E * torch.arange(E.shape[1])).sum().backward()
        rows.append(E.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert torch.allclose(rows[0], rows[1], atol=1e-12, rtol=0)
    assert torch.allclose(gradients[0], gradients[1], atol=1e-9 * gradients[1].abs().max(), rtol=0)


def test_the_same_seed_gives_the_same_network_and_another_another():
    state = torch.get_rng_state()
    a, b, c = build("seed=1"), build("seed=1"), build("seed=2")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a.head.weight, b.head.weight)
    assert not torch.equal(a.head.weight, c.head.weight)


def test_local_weights_are_loaded_and_foreign_ones_refused(tmp_path):
    source = models.resnet18()
    path = tmp_path / "resnet18.pth"
    without_classifier = {name: t for name, t in source.state_dict().items() if not name.startswith("fc.")}
    torch.save(without_classifier, path)
    net = build("model.backbone=resnet18", f"model.pretrained={path}")
    assert torch.equal(net.trunk[0].weight, source.conv1.weight)
    with pytest.raises(InputError, match="does not fit resnet50"):
        build("model.backbone=resnet50", f"model.pretrained={path}")
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="does not fit resnet18"):
        build("model.backbone=resnet18", f"model.pretrained={path}")
    path.write_bytes(b"no weights")
    with pytest.raises(InputError, match="not a state dict"):
        build("model.backbone=resnet18", f"model.pretrained={path}")
    with pytest.raises(InputError, match="is no file and no run"):
        build("model.backbone=resnet18", f"model.pretrained={tmp_path / 'no'}")


def test_batch_statistics_that_depend_on_ranks_are_named(caplog):
    caplog.set_level("INFO")
    config = settings("model.backbone=resnet18", "model.norm=batch")
    log_batch_norm(build_embedder(config, CPU), config.model, 2)
    assert "depend on the number of ranks" in caplog.text
    with pytest.raises(InputError, match="set model.norm=frozen"):
        build("model.backbone=resnet18", "model.norm=sync")


def test_real_squeezenet_weights(real_data):
    path = real_data / "squeezenet1_0_imagenet.pth"
    net = build("model.backbone=squeezenet1_0", f"model.pretrained={path}")
    assert torch.equal(net.trunk[0].weight, torch.load(path, weights_only=True)["features.0.weight"])


def test_published_weights_are_chosen_by_name():
    def named(pretrained: str):
        return library_weights("resnet50", pretrained).entry

    assert named("torchvision") is models.ResNet50_Weights.IMAGENET1K_V2
    assert named("torchvision:IMAGENET1K_V1") is models.ResNet50_Weights.IMAGENET1K_V1
    with pytest.raises(InputError, match="torchvision-resnet50.pth is no file"):  # a file's name, like any other
        build("model.pretrained=torchvision-resnet50.pth")
    with pytest.raises(InputError, match="has IMAGENET1K_V1, IMAGENET1K_V2 for resnet50; give one of these"):
        named("torchvision:V3")
