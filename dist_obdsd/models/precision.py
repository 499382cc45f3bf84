"""Precision and compilation of the networks in a training step."""

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from dist_obdsd.config import Config
from dist_obdsd.distributed import collectives
from dist_obdsd.distributed.launch import Runtime
from dist_obdsd.errors import InputError
from dist_obdsd.models.teacher import ProgressiveTeacher

logger = logging.getLogger(__name__)


def autocast(config: Config, device: torch.device, teacher: bool = False) -> AbstractContextManager[object]:
    """Open the precision of the student's forward pass, or of the teacher's."""
    return torch.autocast(device.type, torch.bfloat16, enabled=in_bf16(config, teacher))


def in_bf16(config: Config, teacher: bool = False) -> bool:
    """Tell whether the student, or the teacher, runs in bf16."""
    return config.precision == "bf16" or (teacher and config.distillation.teacher_precision == "bf16")


def check_precision(config: Config, device: torch.device) -> None:
    """Raise InputError for bf16 on a GPU that has none."""
    teacher = config.distillation.needs_teacher and config.distillation.teacher_precision == "bf16"
    wish = "precision" if config.precision == "bf16" else "distillation.teacher_precision" if teacher else None
    if wish and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise InputError(
            f"{wish}=bf16 but {torch.cuda.get_device_name(device)} computes no bf16; set it to "
            f"{'float32' if wish == 'precision' else 'same'}"
        )


def blank_images(config: Config, runtime: Runtime) -> torch.Tensor:
    """Make uint8 zeros [b, C, s, s] of the shape that the network sees in a step."""
    b, data = config.batch.global_size // runtime.world_size, config.data
    shape = (min(config.batch.chunk or b, b), data.channels, *data.size)
    return torch.zeros(shape, dtype=torch.uint8, device=runtime.device)


def compile_networks(config: Config, runtime: Runtime, student: nn.Module, teacher: ProgressiveTeacher | None) -> None:
    """Compile what the settings say, before anything wraps the student. Collective.

    Only training calls are compiled: an evaluation's numbers must not depend on a compiler.
    """
    if not config.model.compile:
        return
    networks = {student.train(): autocast(config, runtime.device)}
    if teacher is not None:
        networks[teacher.network] = autocast(config, runtime.device, teacher=True)
    compile_in_place(networks, blank_images(config, runtime))


def compile_in_place(networks: Mapping[nn.Module, AbstractContextManager[object]], images_bCss: torch.Tensor) -> None:
    """Compile networks, each in its precision, on every rank or on none. Collective.

    Each is tried, forward and, where gradients flow, backward, since compilers fail when they are first used.
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
        logger.info(f"model.compile=true does not work on rank {rank} ({why}); all ranks go on without it")


def _try(network: nn.Module, precision: AbstractContextManager[object], images_bCss: torch.Tensor) -> None:
    trains = any(p.requires_grad for p in network.parameters())
    buffers = [buffer.clone() for buffer in network.buffers()]
    try:
        with precision, nullcontext() if trains else torch.inference_mode():
            rows_bD = network(images_bCss)
        if trains:
            rows_bD.sum().backward()
    finally:
        network.zero_grad(set_to_none=True)
        for buffer, before in zip(network.buffers(), buffers, strict=True):
            buffer.copy_(before)  # batch statistics count only what is trained on
