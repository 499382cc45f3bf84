import pytest
import torch
from torchvision import models

from dist_obdsd.errors import InputError
from dist_obdsd.models.backbones import library_weights
from dist_obdsd.models.embedder import log_batch_norm
from tests.models.data import build, pictures, settings

IMAGES = pictures(settings("small_cnn"))


@pytest.mark.parametrize("pooling", ["avg", "max", "avg+max", "gem"])
def test_backbones_give_unit_rows_in_float32(pooling: str) -> None:
    net = build("squeezenet1_0", f"model.pooling={pooling}").eval()
    with torch.autocast("cpu", torch.bfloat16):
        E = net(IMAGES)
    assert (E.shape, E.dtype) == ((4, 8), torch.float32)
    assert torch.allclose(E.norm(dim=1), torch.ones(4), atol=1e-6)


@pytest.mark.parametrize(
    ("backbone", "norm", "alone"), [("small_cnn", "frozen", True), ("resnet18", "frozen", True),
                                    ("resnet18", "batch", False)],
)  # fmt: skip
def test_rows_do_not_depend_on_their_batch_mates(backbone: str, norm: str, alone: bool) -> None:
    net = build(backbone, f"model.norm={norm}", "precision=float64").train()
    assert torch.allclose(net(IMAGES)[:2], net(IMAGES[:2]), atol=1e-13 if alone else 1e-3) == alone


def test_the_seed_alone_decides_the_initial_network() -> None:
    state = torch.get_rng_state()
    a, b, c = (build("small_cnn", f"seed={seed}").head.weight for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_batch_statistics_that_depend_on_ranks_are_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    log_batch_norm(build("resnet18", "model.norm=batch"), settings("resnet18", "model.norm=batch").model, 2)
    assert "depend on the number of ranks" in caplog.text
    with pytest.raises(InputError, match="set model.norm=frozen"):
        build("resnet18", "model.norm=sync")


def test_published_weights_are_chosen_by_name() -> None:
    kinds = models.ResNet50_Weights
    for name, entry in (("torchvision", kinds.IMAGENET1K_V2), ("torchvision:IMAGENET1K_V1", kinds.IMAGENET1K_V1)):
        assert library_weights("resnet50", name).entry is entry
    with pytest.raises(InputError, match="has IMAGENET1K_V1, IMAGENET1K_V2 for resnet50; give one of these"):
        library_weights("resnet50", "torchvision:V3")
