"""Layers of a network: their depth, activation checkpointing and dropout."""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dist_obdsd.errors import InputError

logger = logging.getLogger(__name__)


def blocks(net: nn.Module) -> list[tuple[str, nn.Module]]:
    """List a network's blocks: elements of its containers that have parts."""
    found = list(_elements(net, ""))
    with_parts = [(name, module) for name, module in found if list(module.children())]
    return with_parts or [(name, module) for name, module in found if list(module.parameters())]


def _elements(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    row = isinstance(module, nn.Sequential | nn.ModuleList)
    for name, child in module.named_children():
        if row and not isinstance(child, nn.Sequential | nn.ModuleList):
            yield prefix + name, child
        else:
            yield from _elements(child, f"{prefix}{name}.")


def batch_norms(net: nn.Module) -> list[nn.Module]:
    """List the layers with statistics over a batch."""
    return [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def depths(net: nn.Module) -> dict[str, int]:
    """Number each parameter's layer: 0 before the first block, i in or after the i-th."""
    names, found, depth = [name for name, _ in blocks(net)], {}, 0
    for name, _ in net.named_parameters():
        depth = next((i + 1 for i, block in enumerate(names) if name.startswith(f"{block}.")), depth)
        found[name] = depth
    return found


class _Checkpointed(nn.Module):
    """A mixin that keeps only a block's input for the backward pass."""

    def forward(self, *args: Any) -> Any:
        if self.training and torch.is_grad_enabled():
            return checkpoint(super().forward, *args, use_reentrant=False)
        return super().forward(*args)


def checkpoint_blocks(net: nn.Module) -> None:
    """Keep no activations inside the blocks of a network, or raise InputError."""
    switch: Any = getattr(net, "set_grad_checkpointing", None)
    row = [block for _, block in blocks(net)]
    try:
        if switch is not None:
            switch(True)
        assert switch or row
    except AssertionError as error:
        raise InputError("the backbone has no blocks to checkpoint; set model.checkpoint_blocks=false") from error
    for block in [] if switch else row:
        # A class in place of a wrapper, so that names and copies are as without.
        kind = type(block)
        block.__class__ = type(kind.__name__, (_Checkpointed, kind), {})


def turn_off_dropout(net: nn.Module, name: str) -> None:
    """Set dropout and stochastic depth to 0: their masks would depend on the ranks."""
    found = 0
    for module in net.modules():
        dropout = isinstance(module, nn.modules.dropout._DropoutNd) or type(module).__name__ == "StochasticDepth"
        for rate in ("p",) if dropout else ("drop_prob", "drop_rate", "dropout", "attention_dropout"):
            if dropout or type(getattr(module, rate, None)) is float:
                found += getattr(module, rate) > 0
                setattr(module, rate, 0.0)
    if found:
        logger.info("%s: dropout and stochastic depth are set to 0 in %d layers", name, found)
