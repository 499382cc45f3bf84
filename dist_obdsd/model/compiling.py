"""torch.compile for the networks of a training step, and the way back where it does not work.

Only training calls are compiled: an evaluation's numbers must not depend on what a compiler makes of the network, so it
calls ``forward`` itself.

Legend: b images at a time, C channels, s pixels.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from dist_obdsd import collectives


def compile_in_place(
    networks: Mapping[nn.Module, AbstractContextManager[object]], images_bCss: torch.Tensor, say: Callable[[str], None]
) -> None:
    """Let the networks' calls run what torch.compile makes of them, on every rank or on none. Collective.

    Each is compiled for images of this shape and tried, forward and, where gradients flow, backward, since compilers
    fail when they are first used: a machine may have no C++ compiler, or a GPU that its own does not know.

    Args:
        networks: and the precision that each runs in. Those with weights to train are tried with a backward pass.
        images_bCss: uint8, on the networks' device; the shape of a training step's.
        say: is told where it does not work, and why.
    """
    failure = None
    try:
        for network, precision in networks.items():
            network.compile(dynamic=False)
            _try(network, precision, images_bCss)
    except Exception as error:  # of a dozen kinds, by what is missing
        failure = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')[:200]}"
    failures = collectives.gather_json(failure)
    if any(failures):
        rank, why = next((rank, why) for rank, why in enumerate(failures) if why)
        for network in networks:
            network._compiled_call_impl = None
        say(f"model.compile=true does not work on rank {rank} ({why}); all ranks go on without it")


def _try(network: nn.Module, precision: AbstractContextManager[object], images_bCss: torch.Tensor) -> None:
    trains = any(p.requires_grad for p in network.parameters())
    buffers = [buffer.clone() for buffer in network.buffers()]
    with precision, nullcontext() if trains else torch.inference_mode():
        rows_bD = network(images_bCss)
    if trains:
        rows_bD.sum().backward()
    network.zero_grad(set_to_none=True)
    for buffer, before in zip(network.buffers(), buffers, strict=True):
        buffer.copy_(before)  # batch statistics count only what is trained on
