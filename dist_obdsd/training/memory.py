"""Memory of a rank in training, estimated before anything is allocated."""

import math
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dist_obdsd.config import Config
from dist_obdsd.models.embedder import Embedder, build_embedder
from dist_obdsd.models.precision import autocast


def fake_embedder(config: Config, mode: FakeTensorMode) -> Embedder:
    """Build the network of tensors that have shapes on the CPU but take no memory."""
    model = config.model.model_copy(update={"pretrained": "none"})
    with torch.device("meta"):
        network = build_embedder(config.model_copy(update={"model": model}), torch.device("meta"))
    with mode:
        for module in network.modules():
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    return network


def estimate(config: Config, world_size: int, zero_stage: int = 1) -> dict[str, dict[str, float]]:
    """Estimate the bytes of a rank.

    What lives for a moment (a block that FSDP gathers, the objective's matrices, cuDNN's workspace) is not in it.

    Args:
        zero_stage: of the strategy deepspeed.

    Returns:
        For ddp, deepspeed and fsdp the bytes of weights, gradients, optimizer, teacher and activations.
    """
    mode = FakeTensorMode()
    network = fake_embedder(config, mode)
    weights = list(network.parameters())
    trained = [p for p in weights if p.requires_grad]
    kept = 2 if config.optim.name != "sgd" else int(config.optim.momentum > 0)  # numbers that it has of a weight
    activations = saved_bytes(network, config, mode, config.batch.global_size // world_size)
    shards = world_size // math.gcd(world_size, config.fsdp.replicate)
    ways = {  # strategy: (over how many ranks each part is cut, and numbers of the optimizer)
        "ddp": (1, 1, 1, kept),
        # ZeRO's optimizer works on a copy of the weights.
        "deepspeed": (1, world_size if zero_stage == 2 else 1, world_size, kept + 1),
        "fsdp": (shards, shards, shards, kept),
    }
    return {
        strategy: {
            "weights": share(weights, whole),
            "gradients": share(trained, gradients),
            "optimizer": numbers * share(trained, optimizer),
            "teacher": share(weights, whole) * config.distillation.needs_teacher,
            "activations": activations,
        }
        for strategy, (whole, gradients, optimizer, numbers) in ways.items()
    }


def share(parameters: list[torch.nn.Parameter], ranks: int) -> float:
    """Count a rank's bytes of parameters that are cut up along their first dimension."""
    rows = [(p.shape[0] if p.dim() else 1, p) for p in parameters]
    return sum(math.ceil(n / ranks) * p.nbytes / n for n, p in rows)


def saved_bytes(network: Embedder, config: Config, mode: FakeTensorMode, images: int) -> float:
    """Count the bytes that a forward pass keeps for its backward pass."""
    own = {p.untyped_storage()._cdata for p in network.parameters()}
    kept: dict[int, Any] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage()._cdata] = x
        return x

    with mode, autocast(config, torch.device("cpu")), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        shape = (min(images, config.batch.chunk or images), config.data.channels, *config.data.size)
        rows = network(torch.zeros(shape, dtype=torch.uint8))
    return sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in own) if rows.requires_grad else 0
