"""The student under torch's DistributedDataParallel."""

import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_obdsd.distributed.launch import Runtime
from dist_obdsd.models.precision import blank_images
from dist_obdsd.training.strategy import Strategy


class DDPStrategy(Strategy):
    """DistributedDataParallel, or the bare student in a world of one."""

    def _wrap(self, runtime: Runtime) -> nn.Module:
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
        in which order gloo adds up the ranks. So a resumed run would differ, from three ranks on, in the last bits from
        one that went on.
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

    def _unsynced(self) -> AbstractContextManager[None]:
        return self.network.no_sync() if isinstance(self.network, DistributedDataParallel) else nullcontext()
