"""Backbones: networks without their classifier. The only module that knows timm.

A builder returns a module from normalised images to a map of features [b, F, h, w], to tokens [b, n, F] or to features
that the network pools itself [b, F]. Its keyword arguments say what it can do: ``channels`` other than RGB, images of a
``size`` (rows, columns), another ``pooling``, a library's ``weights``, and a ``state`` dict.
"""

import contextlib
import copy
import difflib
import inspect
import urllib.error
import urllib.request
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision import models

from dist_obdsd.config.registry import BACKBONES, import_object
from dist_obdsd.errors import InputError
from dist_obdsd.models import layers
from dist_obdsd.models.pooling import Pool, exchange_pool
from dist_obdsd.models.weights import State, fit, split_source

INCEPTIONS = ("googlenet", "inception_v3")
"""Networks of torchvision whose published weights come with classifiers in the middle."""


@dataclass(frozen=True)
class LibraryWeights:
    """Published weights, and where their file is or would be."""

    entry: Any
    """The library's own description."""
    file: str
    folder: Path
    path: Callable[[], Path | None]
    """Finds the file in the cache."""
    variable: str
    """The environment variable that moves the cache."""
    server: str


def small_cnn(*, channels: int, state: State | None) -> nn.Module:
    """Four convolutions with GroupNorm, for small images of one or three channels."""
    parts: list[nn.Module] = []
    for width in (48, 64, 96, 128):
        # After the pooling, with which it commutes, the ReLU has a quarter of the work.
        parts += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.GroupNorm(8, width), nn.MaxPool2d(2),
                  nn.ReLU(inplace=True)]  # fmt: skip
        channels = width
    del parts[-2]  # the last map is pooled globally, so it keeps its resolution
    net = nn.Sequential(OrderedDict(layers=nn.Sequential(*parts)))
    return fit(net, state, "small_cnn")


def torchvision_model(*, name: str, weights: LibraryWeights | None, state: State | None, pooling: str) -> nn.Module:
    """A classifier of torchvision without its last layer: `resnet50`, `convnext_tiny`."""
    _check_torchvision(name)
    options: dict[str, Any] = {"aux_logits": weights is not None} if name in INCEPTIONS else {}
    with warnings.catch_warnings():
        # SqueezeNet's constructor warns about its classifier, which is dropped.
        warnings.simplefilter("ignore", UserWarning)
        net = _downloaded(lambda: models.get_model(name, weights=weights and weights.entry, **options), weights)
    net = fit(net, state, name)
    if options:
        net.aux_logits, net.aux1, net.aux2, net.AuxLogits, net.transform_input = False, None, None, None, False
    if isinstance(net, models.ResNet):
        return nn.Sequential(*list(net.children())[:-2])
    if isinstance(net, models.SqueezeNet):
        return net.features
    classifier = [path for path, module in net.named_modules() if isinstance(module, nn.Linear)][-1]
    net.set_submodule(classifier, nn.Identity())
    if pooling != "own":
        exchange_pool(net, name, pooling)
    return net


def timm_model(
    *, name: str, weights: LibraryWeights | None, state: State | None, channels: int, size: tuple[int, int],
    pooling: str,
) -> nn.Module:  # fmt: skip
    """A model of timm, with or without a tag: `timm/vit_small_patch14_dinov2.lvd142m`."""
    timm, config = _import_timm(), weights.entry if weights else _timm_config(name, None)
    options: dict[str, Any] = {"img_size": size} if config.fixed_input_size else {}
    if state is not None:
        dropped = (config.classifier,) if isinstance(config.classifier, str) else config.classifier or ()
        state = {key: value for key, value in state.items() if key.rpartition(".")[0] not in dropped}
        # timm converts foreign names and resamples position embeddings; without a classifier the rest must fit.
        options |= {"pretrained_cfg_overlay": {"state_dict": state, "num_classes": 0, "label_offset": 0}}
    elif weights is not None:
        options["pretrained_cfg"] = config.tag
    options["pretrained"] = state is not None or weights is not None

    def build() -> Any:
        try:
            return timm.create_model(name.removeprefix("timm/"), num_classes=0, in_chans=channels, **options)
        except (RuntimeError, KeyError) as error:
            if state is None:
                raise
            raise InputError(f"model.pretrained does not fit {name}: {' '.join(str(error).split())[:200]}") from error
        except AssertionError as error:
            raise InputError(
                f"{name} cannot be built for images of {size[0]} x {size[1]}: {error}; set another data.image_size"
            ) from error

    net = _downloaded(build, weights)
    if pooling != "own":
        exchange_pool(net, name, pooling)
    return net


def own_model(*, name: str, state: State | None, channels: int, size: tuple[int, int]) -> nn.Module:
    """A function of yours that returns a module; it may take `channels` and `size`."""
    build = import_object(name, "model.backbone")
    offered = {"channels": channels, "size": size}
    taken = inspect.signature(build).parameters
    net = build(**{key: value for key, value in offered.items() if key in taken})
    if not isinstance(net, nn.Module):
        raise InputError(f"model.backbone={name} returned a {type(net).__name__}; it must return a torch.nn.Module")
    return fit(net, state, name)


def build_backbone(
    name: str, *, pretrained: str = "none", state: State | None = None, channels: int = 3,
    size: tuple[int, int] = (224, 224), pooling: str = "own",
) -> tuple[nn.Module, Pool, int]:  # fmt: skip
    """Build a network for images of a size and its pooling, and count its features.

    Raises:
        InputError: there is no such network, its weights are missing or do not fit, or it cannot take such images.
    """
    weights = library_weights(name, pretrained) if split_source(pretrained)[0] else None
    net = BACKBONES.build(
        name, {}, name=name, weights=weights, state=state, channels=channels, size=size, pooling=pooling
    )  # fmt: skip
    layers.turn_off_dropout(net, name)
    pool = Pool("avg" if pooling == "own" else pooling, getattr(net, "num_prefix_tokens", 0))
    try:
        with torch.no_grad():
            x = net.eval()(torch.zeros(1, channels, *size))
    except Exception as error:  # of any kind, from inside a network
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise InputError(
            f"{name} takes no images of {channels} x {size[0]} x {size[1]}: {reason}; set another data.image_size"
        ) from error
    if not isinstance(x, torch.Tensor) or x.dim() not in (2, 3, 4):
        found = list(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
        raise InputError(f"{name} gives {found} for one image; give features [1, F], [1, F, h, w] or tokens [1, n, F]")
    if pooling == "cls" and x.dim() == 4:
        raise InputError(f"model.pooling=cls takes tokens, and {name} gives a map; set model.pooling=own")
    net.train()
    if ":" in name:
        blank_2 = torch.zeros(2, channels, *size)
        with torch.no_grad():
            first, second = (pool(copy.deepcopy(net)(blank_2)) for _ in range(2))
        if not torch.equal(first, second):
            raise InputError(f"{name} draws random numbers in training, which ranks draw differently; turn it off")
    return net, pool, pool(x).shape[1]


def library_weights(name: str, pretrained: str) -> LibraryWeights:
    """Find published weights without downloading them, or raise InputError."""
    _, tag = split_source(pretrained)
    if not name.startswith("timm/"):
        _check_torchvision(name)
        known = models.get_model_weights(name)
        if tag not in known.__members__:
            names = ", ".join(weights.name for weights in known) or "none"
            raise InputError(
                f"model.pretrained=torchvision:{tag}: torchvision has {names} for {name}; give one of these, or "
                f"torchvision for the newest"
            )
        entry = known[tag]
        return _by_url(entry, entry.url)
    config = _timm_config(name, tag)
    if not config.hf_hub_id:
        if not config.url:
            raise InputError(f"timm has no weights for {name}; set model.pretrained to none or to a file")
        return _by_url(config, config.url)
    from huggingface_hub import constants, try_to_load_from_cache

    files = [config.hf_hub_filename] if config.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]

    def cached() -> Path | None:
        paths = [try_to_load_from_cache(config.hf_hub_id, file) for file in files]
        return next((Path(path) for path in paths if isinstance(path, str)), None)

    folder = Path(constants.HF_HUB_CACHE)
    return LibraryWeights(config, f"{config.hf_hub_id}/{files[0]}", folder, cached, "HF_HOME", constants.ENDPOINT)


def _by_url(entry: Any, url: str) -> LibraryWeights:
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    return LibraryWeights(
        entry, path.name, path.parent, lambda: path if path.is_file() else None, "TORCH_HOME", url
    )  # fmt: skip


def _downloaded(build: Callable[[], Any], found: LibraryWeights | None) -> Any:
    """Build a network; where its weights are not cached, a failure is the download's."""
    try:
        if found is not None and found.path() is None:
            with contextlib.suppress(urllib.error.HTTPError):  # it answers; without a network this fails at once
                urllib.request.urlopen(urllib.request.Request(found.server, method="HEAD"), timeout=20).close()
        return build()
    except Exception as error:
        if found is None or found.path() is not None:
            raise
        reason = next(iter(str(error).splitlines()), "")[:120] or type(error).__name__
        raise InputError(
            f"the weights {found.file} are not in {found.folder} and cannot be downloaded ({reason}); fetch them "
            f"where there is a network with dist-obdsd doctor CONFIG --download and set {found.variable}, or set "
            f"model.pretrained to a file of weights, a run, or none"
        ) from error


def input_defaults(name: str, pretrained: str) -> Mapping[str, Any]:
    """Look up a network's own image_size, mean and std, or raise InputError."""
    source, tag = split_source(pretrained)
    if name.startswith("timm/"):
        config = _timm_config(name, tag if source else None)
        rows, columns = config.input_size[1:]
        size, mean, std = rows if rows == columns else (rows, columns), config.mean, config.std
    else:
        _check_torchvision(name)
        weights = library_weights(name, pretrained).entry if source else models.get_model_weights(name)["DEFAULT"]
        preset = weights.transforms()
        centred = source and name in INCEPTIONS  # their weights expect pixels from -1 to 1
        size, (mean, std) = preset.crop_size[0], ((0.5,) * 3,) * 2 if centred else (preset.mean, preset.std)
    return {"image_size": size, "mean": tuple(mean), "std": tuple(std)}


def layer_depths(net: nn.Module) -> dict[str, int]:
    """Number the layer of each parameter: 0 is the stem, 1 the first block."""
    matcher: Any = getattr(net, "group_matcher", None)
    if matcher is None:
        return layers.depths(net)
    from timm.models import group_parameters

    depths = group_parameters(net, matcher(coarse=False), reverse=True)
    return {name: depths[name] for name, _ in net.named_parameters()}


def to_sync_batch_norm(net: nn.Module) -> nn.Module:
    """Exchange every BatchNorm, timm's fused with activations, too."""
    if any(type(module).__module__.startswith("timm.") for module in net.modules()):
        from timm.layers import convert_sync_batchnorm

        return convert_sync_batchnorm(net)
    return nn.SyncBatchNorm.convert_sync_batchnorm(net)


def _check_torchvision(name: str) -> None:
    known = models.list_models(module=models)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
        raise InputError(
            f"model.backbone is {name!r}; set it to small_cnn, a classifier of torchvision such as "
            f"{', '.join(near) or 'resnet50'}, timm/NAME or package:function"
        )


def _timm_config(name: str, tag: str | None) -> Any:
    timm, name = _import_timm(), name.removeprefix("timm/")
    bare = name.partition(".")[0]
    if not timm.is_model(bare):
        near = difflib.get_close_matches(bare, timm.list_models(), n=3, cutoff=0.3)
        raise InputError(f"timm has no model {bare}; set model.backbone to one such as timm/{', timm/'.join(near)}")
    if tag not in (None, "DEFAULT"):
        name = f"{bare}.{tag}"
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError:
        config = None
    if config is None:
        tags = ", ".join(full.partition(".")[2] for full in timm.list_pretrained(f"{bare}.*")) or "none"
        raise InputError(f"timm has no weights {name.partition('.')[2]} for {bare}; it has {tags}")
    return config


def _import_timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise InputError("model.backbone=timm/NAME needs timm; pip install 'dist-obdsd[timm]'") from error
    return timm
