"""Strategies: the ranks' gradients become one, and steps are taken or masked."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from dist_obdsd.config import Config
from dist_obdsd.config.registry import STRATEGIES
from dist_obdsd.distributed import collectives
from dist_obdsd.distributed.launch import Runtime
from dist_obdsd.distributed.shards import shard_state
from dist_obdsd.models.embedder import Embedder
from dist_obdsd.models.precision import autocast
from dist_obdsd.training.optimizers import (
    Named,
    build_objective_optimizer,
    build_optimizer,
    load_state_by_name,
    state_by_name,
)

States = dict[str, dict[str, Any]]
"""Parameter name -> the optimizer's state of it, with tensors of the parameter's shape: the checkpoint's layout."""


class Strategy(ABC):
    """The student with its optimizer, on one rank of several.

    A rank's loss has the gradient of ``W * local sum / global count``; what is applied is the mean over the W ranks.
    The objective's own parameters stay outside the wrapper and have an optimizer of their own. The loss averages their
    gradients, and both kinds count in one gradient norm.
    """

    def __init__(
        self, student: nn.Module, config: Config, runtime: Runtime, objective_parameters: Sequence[Named] = ()
    ) -> None:
        """Wrap the student. Collective."""
        self.student, self.config, self.device = student, config, runtime.device
        self.shard(student)
        self.parameters = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
        depths = student.layer_depths() if isinstance(student, Embedder) else None
        self.optimized = self._optimized()
        self.optimizer = build_optimizer(config.optim, self.optimized, depths)
        self.objective_parameters = list(objective_parameters)
        self.objective_optimizer = build_objective_optimizer(config, self.objective_parameters)
        self._chunks: Sequence[torch.Tensor] = ()
        """The images of one step, where they are embedded in chunks."""
        # Only per-rank batch statistics differ between ranks; other buffers need no broadcast at each forward.
        self.buffers_differ = config.model.norm == "batch"
        self.network = self._wrap(runtime)

    def shard(self, network: nn.Module, teacher: bool = False) -> None:
        """Cut a network's weights up over the ranks, if the strategy does. Collective.

        Args:
            teacher: whether it is the teacher's network, in the teacher's precision, and never trained.
        """
        return

    @abstractmethod
    def _wrap(self, runtime: Runtime) -> nn.Module:
        """The student with what sums its gradients over the ranks. Collective."""

    def _optimized(self) -> list[Named]:
        """List what the optimizer changes, by the parameters' names."""
        return self.parameters

    def embed(self, images_bCss: torch.Tensor) -> torch.Tensor:
        """E_bD with gradient, which ``step`` hands on to the parameters.

        More than ``batch.chunk`` images are embedded in chunks without a graph, so a big batch needs the memory of a
        small one. ``step`` embeds each chunk again (Gao et al., Scaling deep contrastive learning batch size under
        memory limited setup, arXiv 2101.06983). That changes nothing, since no network here draws random numbers.
        """
        self._chunks = images_bCss.split(self.config.batch.chunk or len(images_bCss))
        if len(self._chunks) == 1:
            return self._forward(self.network, images_bCss)
        with torch.no_grad():
            self._E_bD = torch.cat([self._forward(self.student, images) for images in self._chunks])
        return self._E_bD.requires_grad_()

    def _forward(self, network: nn.Module, images_bCss: torch.Tensor) -> torch.Tensor:
        with autocast(self.config, self.device):
            return network(images_bCss)

    def step(self, loss: torch.Tensor, nonfinite: torch.Tensor, rate: float) -> torch.Tensor:
        """Run backward and an optimizer step, or none if anything is NaN or infinite.

        The fused optimizers mask the step on the device by their own flag, so the host need not wait to decide. The
        gradient is the same on every rank, and so is the decision.

        Args:
            loss: this rank's scalar, from the rows that ``embed`` gave last.
            nonfinite: above 0 when a loss sum was not finite on any rank.
            rate: the learning rate.

        Returns:
            [2]: the gradient's norm, and 1 if the step was masked.
        """
        if len(self._chunks) > 1:
            self._backward_in_chunks(loss)
        else:
            self._backward(loss)
        own = [p for _, p in self.objective_parameters]
        norm = self._clipped_norm(own)
        masked = ((nonfinite > 0) | ~torch.isfinite(norm)).float()
        _prepare(self.optimizer, masked, rate)
        self._take_step()
        if self.objective_optimizer is not None:
            _prepare(self.objective_optimizer, masked, rate)
            self.objective_optimizer.step()
            self.objective_optimizer.zero_grad(set_to_none=False)
        return torch.stack([norm.double(), masked.double()])

    def _backward_in_chunks(self, loss: torch.Tensor) -> None:
        loss.backward()  # as far as the embeddings
        assert self._E_bD.grad is not None
        gradients = self._E_bD.grad.split(len(self._chunks[0]))
        for images, gradient in zip(self._chunks, gradients, strict=True):
            with nullcontext() if images is self._chunks[-1] else self._unsynced():
                # A scalar whose gradient at the embeddings is the loss's.
                self._backward((self._forward(self.network, images) * gradient).sum())

    def _backward(self, loss: torch.Tensor) -> None:
        """Add the student's gradients of a scalar; outside ``_unsynced``, over all ranks."""
        loss.backward()

    def _unsynced(self) -> AbstractContextManager[None]:
        """A context in which each rank adds up its gradients alone."""
        return nullcontext()

    def _clipped_norm(self, own: list[nn.Parameter]) -> torch.Tensor:
        """Clip the student's and ``own`` gradient, if asked for; return the norm before."""
        parameters = [p for _, p in self.parameters] + own
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.config.optim.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.config.optim.clip_norm, norm)
        return norm

    def _take_step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # the student's gradients are views of DDP's buckets

    def whole_student(self) -> nn.Module:
        """Return the student with all weights, for calls of a rank alone. Collective."""
        return self.student

    def sync_buffers(self) -> None:
        """Make the student the same on every rank, batch statistics too. Collective."""
        if self.buffers_differ:
            collectives.broadcast_([buffer for _, buffer in self.student.named_buffers()])

    def state_dict(self) -> dict[str, Any]:
        """Return the checkpoint's entries, complete on rank 0. Collective."""
        return {
            "student": self.student.state_dict(),
            "optimizer": self._optimizer_state(),
            "objective_optimizer": state_by_name(self.objective_optimizer, self.objective_parameters),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a checkpoint's weights and optimizer states, whatever strategy wrote them."""
        self.student.load_state_dict(shard_state(state["student"], self.student))
        self._load_optimizer(state["optimizer"])
        load_state_by_name(self.objective_optimizer, self.objective_parameters, state["objective_optimizer"])

    def _optimizer_state(self) -> States:
        return state_by_name(self.optimizer, self.optimized)

    def _load_optimizer(self, states: States) -> None:
        load_state_by_name(self.optimizer, self.optimized, states)


def _prepare(optimizer: torch.optim.Optimizer, masked: torch.Tensor, rate: float) -> None:
    optimizer.found_inf = masked  # type: ignore[attr-defined]
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


def build_strategy(
    student: nn.Module, config: Config, runtime: Runtime, objective_parameters: Sequence[Named]
) -> Strategy:
    """Build the config's strategy, or raise InputError. Collective."""
    strategy: type[Strategy] = STRATEGIES.load(config.strategy)
    return strategy(student, config, runtime, objective_parameters)
