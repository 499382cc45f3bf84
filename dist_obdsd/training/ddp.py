"""How the student's gradients become one gradient on every rank, and how a step is taken or masked."""

import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_obdsd.config import Config
from dist_obdsd.distributed import collectives
from dist_obdsd.distributed.launch import Runtime
from dist_obdsd.models.precision import autocast, blank_images
from dist_obdsd.training.grad_cache import GradCache
from dist_obdsd.training.optimizers import (
    Named,
    build_objective_optimizer,
    build_optimizer,
    load_state_by_name,
    state_by_name,
)

States = dict[str, dict[str, Any]]
"""Parameter name -> the optimizer's state of it, with tensors of the parameter's shape: the checkpoint's layout."""


class DDPStrategy:
    """DistributedDataParallel: the mean over the ranks of gradients of ``W * local sum / global count``.

    The objective's own parameters stay outside the wrapper, with an optimizer of their own; their gradients are
    averaged here, and both kinds count in one gradient norm.
    """

    def __init__(
        self, student: nn.Module, config: Config, runtime: Runtime, objective_parameters: Sequence[Named] = ()
    ) -> None:
        """Wrap the student. Collective."""
        self.student = student
        self.config = config
        self.device = runtime.device
        self.parameters = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
        self.optimizer = build_optimizer(config.optim, self.parameters)
        self.objective_parameters = list(objective_parameters)
        self.objective_optimizer = build_objective_optimizer(config, self.objective_parameters)
        self._cached: GradCache | None = None
        # Only per-rank batch statistics differ between ranks; other buffers need no broadcast at each forward.
        self.buffers_differ = config.model.norm == "batch"
        self.network = self._wrap(runtime)

    def _wrap(self, runtime: Runtime) -> nn.Module:
        """The student with what sums up its gradients over the ranks."""
        if runtime.world_size == 1:
            return self.student
        with warnings.catch_warnings():
            # torch 2.15 announces a new name for broadcast_buffers, which older versions do not know.
            warnings.simplefilter("ignore", FutureWarning)
            network = DistributedDataParallel(
                self.student,
                device_ids=[runtime.device.index] if runtime.device.type == "cuda" else None,
                broadcast_buffers=self.buffers_differ,
                gradient_as_bucket_view=True,
            )
        self._warm_up_buckets(network, blank_images(self.config, runtime))
        return network

    def _warm_up_buckets(self, network: DistributedDataParallel, images_bCss: torch.Tensor) -> None:
        """Bring the gradient buckets to their final layout before the first real step.

        DDP groups the gradients anew after its first backward pass, by the order in which they came. The layout decides
        in which order gloo adds up the ranks, so a run that is resumed would differ, from three ranks on, in the last
        bits from one that went on.
        """
        if not self.config.model.compile:
            images_bCss = images_bCss[:2]  # any will do, unless another shape would be compiled, too
        kept = [buffer.clone() for buffer in self.student.buffers()]
        for _ in range(2):
            self._forward(network, images_bCss).sum().backward()
        for p in self.student.parameters():
            if p.grad is not None:
                p.grad.zero_()
        for buffer, before in zip(self.student.buffers(), kept, strict=True):
            buffer.copy_(before)

    def embed(self, images_bCss: torch.Tensor) -> torch.Tensor:
        """E_bD with gradient, which ``step`` hands on to the parameters."""
        chunk = self.config.batch.chunk
        if chunk is None or images_bCss.shape[0] <= chunk:
            self._cached = None
            return self._forward(self.network, images_bCss)
        self._cached = GradCache(lambda images: self._forward(self.student, images), images_bCss, chunk)
        return self._cached.E_bD

    def _forward(self, network: nn.Module, images_bCss: torch.Tensor) -> torch.Tensor:
        with autocast(self.config, self.device):
            return network(images_bCss)

    def step(self, loss: torch.Tensor, nonfinite: torch.Tensor, rate: float) -> torch.Tensor:
        """Backward and one optimizer step, or none at all when anything is NaN or infinite.

        The step is masked on the device by the fused optimizers' own flag, so the host need not wait to decide. The
        gradient is the same on every rank, and so is the decision.

        Args:
            loss: this rank's scalar, from the rows that ``embed`` gave last.
            nonfinite: above 0 when a loss sum was not finite on any rank.
            rate: the learning rate.

        Returns:
            [2]: the gradient's norm, and 1 if the step was masked.
        """
        if self._cached is None:
            self._backward(loss)
        else:
            loss.backward()
            self._cached.backward(lambda images: self._forward(self.network, images), self._unsynced, self._backward)
            self._cached = None
        own = [p for _, p in self.objective_parameters]
        collectives.average_gradients_(own)
        norm = self._clipped_norm(own)
        masked = ((nonfinite > 0) | ~torch.isfinite(norm)).float()
        _prepare(self.optimizer, masked, rate)
        self._take_step()
        if self.objective_optimizer is not None:
            _prepare(self.objective_optimizer, masked, rate)
            self.objective_optimizer.step()
            self.objective_optimizer.zero_grad(set_to_none=False)
        return torch.stack([norm.double(), masked.double()])

    def _backward(self, loss: torch.Tensor) -> None:
        """Add the student's gradients of a scalar; outside ``_unsynced``, over all ranks."""
        loss.backward()

    def _unsynced(self) -> AbstractContextManager[None]:
        """A context in which gradients are added up on each rank alone."""
        return self.network.no_sync() if isinstance(self.network, DistributedDataParallel) else nullcontext()

    def _clipped_norm(self, own: list[nn.Parameter]) -> torch.Tensor:
        """The norm of the whole gradient, the student's and ``own``, before it was clipped, if it is to be."""
        parameters = [p for _, p in self.parameters] + own
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.config.optim.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.config.optim.clip_norm, norm)
        return norm

    def _take_step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # the student's gradients are views of DDP's buckets

    def sync_buffers(self) -> None:
        """Make the student the same on every rank, also where its batch statistics were each rank's own. Collective."""
        if self.buffers_differ:
            collectives.broadcast_([buffer for _, buffer in self.student.named_buffers()])

    def optimizer_state(self) -> States:
        """The state of the student's optimizer. Collective; complete on rank 0."""
        return state_by_name(self.optimizer, self.parameters)

    def load(self, student: dict[str, torch.Tensor], optimizer: States, objective_optimizer: States) -> None:
        """Take a checkpoint's weights and optimizer states, whatever strategy wrote them."""
        self.student.load_state_dict(student)
        self._load_optimizer(optimizer)
        load_state_by_name(self.objective_optimizer, self.objective_parameters, objective_optimizer)

    def _load_optimizer(self, states: States) -> None:
        load_state_by_name(self.optimizer, self.parameters, states)

    def objective_optimizer_state(self) -> States:
        """The state of the objective parameters' optimizer, the same on every rank."""
        return state_by_name(self.objective_optimizer, self.objective_parameters)


def _prepare(optimizer: torch.optim.Optimizer, masked: torch.Tensor, rate: float) -> None:
    optimizer.found_inf = masked  # type: ignore[attr-defined]
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


def build_strategy(
    student: nn.Module, config: Config, runtime: Runtime, objective_parameters: Iterable[Named]
) -> DDPStrategy:
    """The strategy that the settings name. Collective.

    Raises:
        InputError: DeepSpeed is asked for and missing, or its own settings do not fit.
    """
    if config.strategy == "deepspeed":
        from dist_obdsd.training.deepspeed import DeepSpeedStrategy

        return DeepSpeedStrategy(student, config, runtime, list(objective_parameters))
    return DDPStrategy(student, config, runtime, list(objective_parameters))
