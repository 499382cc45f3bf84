"""Weights that training begins with, and what fine-tuning leaves as it is."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torchvision import models
from torchvision.transforms.functional import normalize

from dist_obdsd import checkpoint
from dist_obdsd.errors import InputError
from dist_obdsd.models.backbones import build_backbone, input_defaults
from tests.models.data import build, pictures, settings


@pytest.fixture
def run(tmp_path):
    """A run's folder with one checkpoint."""
    state = dict.fromkeys(checkpoint.ENTRIES - {"format"}) | {
        "config": settings("timm/test_vit", "seed=7").model_dump(mode="json"),
        "student": build("timm/test_vit", "seed=7").state_dict(),
        "position": {"epoch": 1, "step": 0, "global_step": 1},
    }  # fmt: skip
    checkpoint.save(tmp_path / "run" / "checkpoints", state, best=False, keep=1)
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("backbone", "suffix"),
    [("timm/test_vit", "pth"), ("timm/test_resnet", "safetensors"), ("mobilenet_v3_small", "pth")],
)
def test_a_file_s_weights_are_those_of_the_network(backbone, suffix, tmp_path):
    source, path = build(backbone, "seed=7"), tmp_path / f"weights.{suffix}"
    state = {name: value.contiguous() for name, value in source.trunk.state_dict().items()}
    seven_classes = {"classifier.3.weight": torch.zeros(7, 1024)} if backbone.startswith("mobilenet") else {}
    save_file(state, path) if suffix == "safetensors" else torch.save({"state_dict": state | seven_classes}, path)
    found = build(backbone, f"model.pretrained={path}").trunk.state_dict()
    assert all(torch.equal(found[name], value) for name, value in state.items())
    assert not torch.equal(next(iter(build(backbone).trunk.parameters())), next(iter(source.trunk.parameters())))
    state.pop(list(state)[3])
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(InputError, match="does not fit"):
        build(backbone, f"model.pretrained={tmp_path / 'part.pth'}")


@pytest.mark.parametrize(
    ("content", "fact"),
    [({"a": torch.zeros(1)}, "does not fit resnet18"), (b"no weights", "not a state dict"), (None, "no file and no")],
)
def test_files_that_hold_no_weights_are_refused(content, fact, tmp_path):
    path = tmp_path / "x.pth"
    if content is not None:
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(InputError, match=fact):
        build("resnet18", f"model.pretrained={path}")


def test_position_embeddings_are_resampled(tmp_path):
    source = build("timm/test_vit").trunk
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    wide = build("timm/test_vit", f"model.pretrained={tmp_path / 'vit.pth'}", "data.image_size=[32, 64]").trunk
    assert wide.pos_embed.shape[1] - 1 == 2 * (source.pos_embed.shape[1] - 1)
    assert torch.equal(wide.blocks[0].mlp.fc1.weight, source.blocks[0].mlp.fc1.weight)


def test_a_run_goes_on_from_another_run(run):
    theirs = checkpoint.load(run)["student"]
    for path in (run, run / "checkpoints" / "epoch-0001.pt"):
        found = build("timm/test_vit", f"model.pretrained={path}").state_dict()
        assert all(torch.equal(found[name], value) for name, value in theirs.items())
    longer = build("timm/test_vit", f"model.pretrained={run}", "model.embedding_dim=16")
    assert torch.equal(longer.trunk.cls_token, theirs["trunk.cls_token"])
    assert longer.head.weight.shape[0] == 16
    with pytest.raises(InputError, match="is of model.backbone=timm/test_vit, which does not fit timm/test_resnet"):
        build("timm/test_resnet", f"model.pretrained={run}", "data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]")
    with pytest.raises(InputError, match=r"was trained with data.mean=\[0.5, 0.5, 0.5\]"):
        build("timm/test_vit", f"model.pretrained={run}", "data.mean=[0.1,0.1,0.1]")


@pytest.mark.parametrize(("backbone", "file"), [("timm/resnet18", "a1_in1k/model.safetensors"), ("resnet18", ".pth")])
def test_missing_weights_are_told_with_their_place(backbone, file, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # where nobody answers
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(InputError) as caught:
        build(backbone, f"model.pretrained={'timm' if '/' in backbone else 'torchvision'}")
    said = str(caught.value)
    assert all(fact in said for fact in (file, str(tmp_path), "--download", "model.pretrained"))
    assert "\n" not in said


@pytest.mark.parametrize(
    ("name", "file"),
    [("googlenet", "googlenet-1378be20.pth"), ("inception_v3", "inception_v3_google-0cc3c7bd.pth")],
)
def test_classifiers_in_the_middle_are_dropped(name, file, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    published = models.get_model(name, aux_logits=True, init_weights=False, transform_input=True)
    torch.save(published.state_dict(), tmp_path / "hub" / "checkpoints" / file)
    net, _, features = build_backbone(name, pretrained="torchvision", size=(80, 80))
    published.fc, images, ours = torch.nn.Identity(), torch.rand(2, 3, 80, 80), input_defaults(name, "torchvision")
    theirs = models.get_model_weights(name)["DEFAULT"].transforms()
    expected = published.eval()(normalize(images, theirs.mean, theirs.std))
    torch.testing.assert_close(net.eval()(normalize(images, ours["mean"], ours["std"])), expected, rtol=1e-3, atol=1e-4)
    rows = net.train()(images)
    rows.sum().backward()
    assert rows.shape == (2, features)
    assert all(p.grad is not None for p in net.parameters())  # DDP waits for every gradient


@pytest.mark.parametrize("backbone", ["timm/test_vit", "mobilenet_v3_small"])
def test_freezing_stops_at_a_block(backbone):
    model = build(backbone, "model.freeze=2")
    depths = model.layer_depths()
    assert {depths[name] for name, p in model.named_parameters() if not p.requires_grad} == {0, 1, 2}
    assert min(depths[name] for name, p in model.named_parameters() if p.requires_grad) == 3
    everything = build(backbone, "model.freeze=all")
    assert [name for name, p in everything.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    with pytest.raises(InputError, match="set model.freeze to at most that"):
        build(backbone, "model.freeze=99")


@pytest.mark.parametrize("backbone", ["timm/test_vit", "squeezenet1_0"])
def test_activation_checkpointing_changes_no_gradient(backbone):
    saved, gradients, images = [], [], pictures(settings(backbone))
    for choice in ("false", "true"):
        model, kept = build(backbone, f"model.checkpoint_blocks={choice}", "precision=float64"), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.nbytes) or x, lambda x: x):
            E_bD = model(images)
        saved.append(sum(kept))
        (E_bD * torch.arange(8)).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert not copy.deepcopy(model).eval()(images).isnan().any()
    assert saved[1] < 0.8 * saved[0]
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[1][name], g, atol=1e-10) for name, g in gradients[0].items())
