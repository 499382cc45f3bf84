"""How the student's gradients become one gradient on every rank, and how a step is taken or masked."""

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_obdsd import collectives
from dist_obdsd.config import Config
from dist_obdsd.runtime import Runtime
from dist_obdsd.training.accumulation import CachedGradient
from dist_obdsd.training.optim import Named, build_objective_optimizer, build_optimizer


class DDPStrategy:
    """DistributedDataParallel: the mean over the ranks of gradients of ``W * local sum / global count``.

    The objective's own parameters stay outside the wrapper, with an optimizer of their own; their gradients are
    averaged here, and both kinds count in one gradient norm.
    """

    def __init__(
        self, student: nn.Module, settings: Config, runtime: Runtime, objective_parameters: Sequence[Named] = ()
    ) -> None:
        self.student = student
        self.settings = settings
        self.device = runtime.device
        self.parameters = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
        self.optimizer = build_optimizer(settings.optim, self.parameters)
        self.objective_parameters = list(objective_parameters)
        self.objective_optimizer, self.objective_rate = build_objective_optimizer(settings, self.objective_parameters)
        self._cached: CachedGradient | None = None
        # Only per-rank batch statistics differ between ranks; other buffers need no broadcast at each forward.
        self.buffers_differ = settings.model.norm == "batch"
        self.network: nn.Module = student
        if runtime.world_size > 1:
            with warnings.catch_warnings():
                # torch 2.15 announces a new name for broadcast_buffers, which older versions do not know.
                warnings.simplefilter("ignore", FutureWarning)
                self.network = DistributedDataParallel(
                    student,
                    device_ids=[runtime.device.index] if runtime.device.type == "cuda" else None,
                    broadcast_buffers=self.buffers_differ,
                    gradient_as_bucket_view=True,
                )

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")

    def embed(self, images_bCss: torch.Tensor) -> torch.Tensor:
        """E_bD with gradient, which ``step`` hands on to the parameters."""
        chunk = self.settings.batch.chunk
        if chunk is None or images_bCss.shape[0] <= chunk:
            self._cached = None
            return self._through(self.network, images_bCss)
        self._cached = CachedGradient(lambda images: self._through(self.student, images), images_bCss, chunk)
        return self._cached.E_bD

    def _through(self, network: nn.Module, images_bCss: torch.Tensor) -> torch.Tensor:
        with self.autocast():
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
        loss.backward()
        if self._cached is not None:
            unsynced = self.network.no_sync if isinstance(self.network, DistributedDataParallel) else nullcontext
            self._cached.backward(lambda images: self._through(self.network, images), unsynced)
            self._cached = None
        collectives.average_gradients_([p for _, p in self.objective_parameters])
        parameters = [p for _, p in self.parameters + self.objective_parameters]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.settings.optim.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.settings.optim.clip_norm, norm)
        masked = ((nonfinite > 0) | ~torch.isfinite(norm)).float()
        self._take(self.optimizer, masked, rate)
        if self.objective_optimizer is not None:
            self._take(self.objective_optimizer, masked, rate * self.objective_rate)
        return torch.stack([norm.double(), masked.double()])

    def _take(self, optimizer: torch.optim.Optimizer, masked: torch.Tensor, rate: float) -> None:
        optimizer.found_inf = masked  # type: ignore[attr-defined]
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # the student's gradients are views of DDP's buckets

    def sync_buffers(self) -> None:
        """Make the student the same on every rank, also where its batch statistics were each rank's own. Collective."""
        if self.buffers_differ:
            collectives.broadcast_([buffer for _, buffer in self.student.named_buffers()])
