"""Architectures of timm and torchvision, small and untrained, through what a run does with a network."""

import math
from pathlib import Path

import pytest
import torch

from dist_obdsd import checkpoint
from dist_obdsd.config import Config
from dist_obdsd.distributed import collectives
from dist_obdsd.errors import InputError
from dist_obdsd.export import export
from dist_obdsd.losses.multi_similarity import MultiSimilarityLoss
from dist_obdsd.losses.obdsd import OBDSDLoss
from dist_obdsd.models.embedder import build_embedder
from dist_obdsd.models.teacher import ProgressiveTeacher
from dist_obdsd.training.optimizers import build_optimizer
from tests import harness, runs
from tests.models.data import CPU, build, pictures, settings

ARCHITECTURES = {
    "timm/test_resnet": 32, "timm/resnet10t": 32, "timm/resnext26ts": 32, "timm/tf_efficientnet_lite0": 32,
    "timm/mobilenetv3_small_050": 32, "timm/mobilenetv4_conv_small_035": 32, "timm/convnext_atto": 32,
    "timm/convnextv2_atto": 32, "timm/regnetx_002": 32, "timm/test_nfnet": 32, "timm/vit_tiny_patch16_224": 32,
    "timm/deit_tiny_patch16_224": 32, "timm/deit_tiny_distilled_patch16_224": 32,
    "timm/vit_small_patch14_dinov2": 28, "timm/vit_small_patch16_dinov3": 32, "timm/test_vit3": 32,
    "timm/eva02_tiny_patch14_224": 28, "timm/vit_base_patch32_siglip_256": 32, "timm/xcit_nano_12_p16_224": 32,
    "timm/levit_128s": 64, "timm/swin_tiny_patch4_window7_224": 56, "timm/maxvit_pico_rw_256": 64,
    "timm/coatnet_pico_rw_224": 64, "timm/fastvit_t8": 64, "timm/mobilevit_xxs": 64, "resnet18": 32,
    "efficientnet_b0": 32, "mobilenet_v3_small": 32, "convnext_tiny": 32, "regnet_y_400mf": 32, "swin_t": 32,
    "shufflenet_v2_x0_5": 32, "squeezenet1_1": 32,
}  # fmt: skip
"""Backbone -> side of its images."""


def step(config: Config) -> tuple[float, list[torch.Tensor]]:
    """On each rank: the global loss of one step, and its gradient over all ranks."""
    student, objective = build_embedder(config, CPU), OBDSDLoss(MultiSimilarityLoss())
    teacher, images, labels = ProgressiveTeacher(student), pictures(config), torch.tensor([0, 0, 1, 1])
    b = 4 // collectives.world_size()
    own = slice(collectives.rank() * b, collectives.rank() * b + b)
    out = objective(student(images[own]), labels[own], teacher(images[own]))
    out.loss.backward()
    parameters = [p for p in student.parameters() if p.grad is not None]
    gradients = [collectives.sum_across(p.grad) / collectives.world_size() for p in parameters]
    before = {name: p.detach().clone() for name, p in student.trunk.named_parameters()}
    build_optimizer(config.optim, student.named_parameters(), student.layer_depths()).step()
    assert any(not torch.equal(p, before[name]) for name, p in student.trunk.named_parameters())
    teacher.update(student, verify=False)  # of other ranks, as no wrapper averaged the gradients
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), student.eval()(images))
    return out.metrics["ranking"].item() + out.metrics["distillation"].item(), gradients


@pytest.mark.parametrize("backbone", ARCHITECTURES)
def test_an_architecture_steps_and_its_teacher_follows(backbone: str) -> None:
    ((loss, gradients),) = harness.run(1, step, settings(backbone, side=ARCHITECTURES[backbone]))
    assert loss > 0
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("backbone", ["timm/test_efficientnet", "timm/test_vit3", "timm/test_convnext"])
def test_two_ranks_make_the_step_of_one(backbone: str) -> None:
    config = settings(backbone, "precision=float64")
    ((loss, gradients),) = harness.run(1, step, config)
    for other, theirs in harness.run(2, step, config):
        assert other == pytest.approx(loss, abs=1e-10)
        for a, b in zip(gradients, theirs, strict=True):
            assert torch.allclose(a, b, atol=1e-9 * max(1, a.abs().max()))


@pytest.mark.parametrize(
    ("backbone", "pooling"),
    [
        *((b, p) for b in ("timm/test_vit", "timm/test_convnext") for p in ("avg", "max", "avg+max", "gem", "cls")),
        ("resnet18", "cls"),
    ],
)
def test_pooling_is_exchanged_or_refused(backbone: str, pooling: str) -> None:
    if (backbone, pooling) in (("timm/test_vit", "gem"), ("timm/test_convnext", "cls"), ("resnet18", "cls")):
        with pytest.raises(InputError, match="set model.pooling=own"):
            build(backbone, f"model.pooling={pooling}")
        return
    images = pictures(settings(backbone, side=64))
    same, other = (build(backbone, f"model.pooling={kind}", side=64).eval()(images) for kind in ("own", pooling))
    usual = "cls" if backbone == "timm/test_vit" else "avg"
    assert torch.allclose(same, other, atol=1e-6) == (pooling == usual)


PLUG_IN = """
import torch
from torch import nn
from torch.nn import functional
def small(channels, size):
    return nn.Sequential(nn.Conv2d(channels, 6, 3, padding=1), nn.Dropout(0.5), nn.BatchNorm2d(6))
class Random(nn.Module):
    def forward(self, x):
        return functional.dropout(x.mean((2, 3)) + 1, 0.5, self.training)
class Flat(nn.Module):
    def forward(self, x):
        return x.mean()
def nothing():
    return None
"""


def test_a_function_of_another_package_builds_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_networks.py").write_text(PLUG_IN)
    monkeypatch.syspath_prepend(tmp_path)
    config = settings("my_networks:small", side=8)
    assert "my_networks:small" in config.to_yaml()
    model = build_embedder(config, CPU).train()
    assert torch.equal(model(pictures(config)), model(pictures(config)))
    for name, fact in {
        "my_networks:Random": "draws random numbers in training",
        "my_networks:Flat": r"gives \[\] for one image",
        "my_networks:nothing": "it must return a torch.nn.Module",
        "my_other_networks:small": "model.backbone=my_other_networks:small cannot be imported",
    }.items():
        with pytest.raises(InputError, match=fact):
            build(name, side=8)


RUN = (
    "data.channels=3", "data.mean=[0.5,0.5,0.5]", "data.std=[0.2,0.2,0.2]", "data.image_size=32", "epochs=2",
    "data.augment=crop", "precision=float32", "data.workers=0", "model.backbone=timm/test_vit3",
    "optim.warmup_steps=2", "optim.layer_decay=0.7",
)  # fmt: skip


def test_a_run_learns_resumes_and_is_exported(folder: Path) -> None:
    runs.train(folder, "name=whole", *RUN)
    runs.train(folder, "name=cut", *RUN, "max_steps=4")
    runs.train(folder, "name=cut", *RUN)
    assert all(math.isfinite(row["distillation"]) for row in runs.metrics(folder / "runs" / "whole", "step")[6:])
    whole, cut = (checkpoint.load(folder / "runs" / name) for name in ("whole", "cut"))
    assert all(torch.equal(whole["student"][name], value) for name, value in cut["student"].items())
    image = pictures(settings("timm/test_vit3"))[0]
    assert export(folder / "runs" / "cut", folder / "ex", ["torch"], [image], "noise")["torch"] <= 1e-5
