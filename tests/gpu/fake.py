"""Steps on a device that is not there: shapes and devices as they would be, no numbers, any number of ranks.

A process of its own registers a stand-in for a device: torch's own fake ``cuda`` tensors have no backward where a build
with CUDA finds no GPU. An operation fails that reads a number on the host or mixes devices. One that is no view counts
as a launch.

Legend: b rows of a rank, B of the global batch, D embedding dimension, W ranks.
"""

import multiprocessing
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from benchmarks import fake
from benchmarks.step import build_step
from dist_obdsd.data.stream import TrainBatch
from dist_obdsd.distributed.launch import Launch, Runtime
from dist_obdsd.losses.across_ranks import local_loss
from dist_obdsd.losses.batch_view import BatchView
from dist_obdsd.losses.build import build_objective
from dist_obdsd.losses.obdsd import is_ranking
from dist_obdsd.manifold.targets import QueuePlan
from dist_obdsd.models.embedder import build_embedder
from dist_obdsd.training.train_step import TrainProgress
from dist_obdsd.transfer import AsyncHostCopy
from tests.gpu.rig import CPU, settings

DEVICE = "standin"


@contextmanager
def metered(W: int) -> Iterator[fake.Meter]:
    """Measure what one of W ranks does with fake tensors."""
    # Python runs the backward in this thread, since there is no device for which the engine could have another.
    one_thread = torch.autograd.set_multithreading_enabled(False)
    with fake.ranks(W, DEVICE), one_thread, fake.FakeMode(), fake.Meter(W, DEVICE) as meter:
        yield meter


def put(network: nn.Module) -> None:
    """Move a network to the device."""
    for part in network.modules():
        for name, p in part.named_parameters(recurse=False):
            part._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=DEVICE), p.requires_grad)
        for name, x in part.named_buffers(recurse=False):
            part._buffers[name] = torch.empty(x.shape, dtype=x.dtype, device=DEVICE)


def objective(W: int, b: int, overrides: list[str], plan: dict[str, Any]) -> fake.Meter:
    """Measure the objective, forward and backward, up to the gradient at the embeddings."""
    config = settings("small_cnn", f"batch.global_size={W * b}", *overrides)
    loss = build_objective(config, range(16), CPU)
    loss._plan = QueuePlan(**plan)
    with metered(W) as meter:
        E_bD, E_BD = (torch.empty(n, 32, device=DEVICE, requires_grad=True) for n in (b, W * b))
        labels_B = torch.empty(W * b, dtype=torch.int64, device=DEVICE)
        T_bD = torch.empty(b, 32, device=DEVICE) if loss.needs_teacher() else None
        teacher = None if T_bD is None else loss.start_teacher(T_bD, early=True)
        rows = () if teacher is None else (teacher.gathering.wait(), teacher.pending)
        terms = loss.terms(BatchView(E_bD, E_BD, labels_B, 0), *rows)
        factors = {name: 1.0 for name in terms if is_ranking(name) or name == "distillation"}
        local_loss(terms, {name: term.count for name, term in terms.items()}, factors, W).backward()
    return meter


def step(W: int, b: int, overrides: list[str], plan: dict[str, Any]) -> fake.Meter:
    """Measure a whole training step of a small network. DDP's messages are missing."""
    config = settings("small_cnn", f"batch.global_size={W * b}", *overrides)
    student, loss = build_embedder(config, CPU), build_objective(config, range(W * b // 2), CPU)
    loss._plan = QueuePlan(**plan)
    with metered(W) as meter:
        put(student)
        taken = build_step(config, Runtime(Launch("fake"), torch.device(DEVICE)), student, loss)
        taken.early_diffusion = True
        images_b = torch.empty(b, 1, 32, 32, dtype=torch.uint8)
        taken(TrainBatch(1, 0, images_b, torch.arange(b), torch.arange(W * b)), TrainProgress(1, 0, 0), 0.0)
    return meter


class Queue:
    """A stream or an event of the device, on which nothing has to wait."""

    stream_id, device_index, device_type = 0, 0, 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...

    def __enter__(self) -> None: ...

    __exit__ = wait_event = record_event = record = wait = synchronize = wait_stream


def make_device() -> None:
    """Register the stand-in, with streams."""
    warnings.simplefilter("ignore")  # torch looks at its fake tensors itself
    AsyncHostCopy.read = lambda self: [0.0] * len(self._numbers_n)  # an error that is small enough
    _setup_privateuseone_for_python_backend(DEVICE)
    module = torch.get_device_module(DEVICE)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    module.Stream = module.Event = module.current_stream = module.stream = Queue


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Measure a job: ``of``, a function here, and its arguments; ``plan`` has fields of a ``QueuePlan``."""
    job = {"of": step, "W": 8, "b": 112, "overrides": [], "plan": {}} | job
    try:
        meter = job.pop("of")(**job)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    return {"launches": meter.launches, "moved_mib": meter.moved >> 20, "peak_mib": meter.peak >> 20,
            "messages": meter.messages}  # fmt: skip


def answers(jobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), make_device) as process:
        return [*process.map(answer, jobs)]
