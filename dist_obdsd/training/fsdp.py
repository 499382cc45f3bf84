"""Student and teacher under FSDP2: every rank holds a shard of each weight.

A block's weights are gathered while it computes and dropped again, and so are its gradients' sums. So weights,
gradients, the optimizer's state and the teacher take a share of the memory that shrinks with the number of ranks. Both
networks are cut alike: the student becomes the teacher by a copy on each rank, without a message.
"""

import copy

import torch
from torch import nn

from dist_obdsd.distributed import collectives, shards
from dist_obdsd.distributed.launch import Runtime
from dist_obdsd.models.layers import batch_norms, blocks
from dist_obdsd.models.precision import in_bf16
from dist_obdsd.training.optimizers import Named
from dist_obdsd.training.strategy import States, Strategy


class FSDPStrategy(Strategy):
    """FSDP2: weights, gradients, optimizer and teacher sharded over the ranks."""

    def shard(self, network: nn.Module, teacher: bool = False) -> None:
        """As ``Strategy.shard``; the student comes first.

        Raises:
            InputError: ``fsdp.replicate`` does not divide the ranks.
        """
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        if not teacher:
            self._mesh = shards.device_mesh(self.device.type, self.config.fsdp.replicate)
            self._unfilled = _without_weights(network)
        # FSDP cannot shard a weight that is a single number, such as that of `gem`.
        numbers = {p for p in network.parameters() if not p.dim()}
        for p in network.parameters():
            p.data = p.data.flatten().view(p.shape)  # FSDP takes no layout with channels innermost
            if p in numbers:
                collectives.average_gradient(p)
        # BatchNorm's kernels want its weights in float32; autocast casts those of the other layers then.
        low = in_bf16(self.config, teacher) and not batch_norms(network)
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if low else MixedPrecisionPolicy()
        for _, block in blocks(network):
            fully_shard(block, mesh=self._mesh, mp_policy=policy, ignored_params=numbers)
        # The student's backward pass begins with the outermost weights, so it keeps those gathered.
        fully_shard(network, mesh=self._mesh, mp_policy=policy, ignored_params=numbers, reshard_after_forward=teacher)

    def _wrap(self, runtime: Runtime) -> nn.Module:
        return self.student

    def _optimized(self) -> list[Named]:
        # The shards themselves, since torch's fused SGD takes no DTensors.
        return [(name, nn.Parameter(shards.local(p.detach()))) for name, p in self.parameters]

    def _clipped_norm(self, own: list[nn.Parameter]) -> torch.Tensor:
        parts = [part for _, part in self.optimized]
        for part, (_, p) in zip(parts, self.parameters, strict=True):
            part.grad = None if p.grad is None else shards.local(p.grad.detach())
        norm = shards.total_norm([part.grad for part in parts if part.dim() and part.grad is not None], self._mesh)
        whole = own + [part for part in parts if not part.dim()]
        if grads := [p.grad for p in whole if p.grad is not None]:  # of none, the host would send a 0 and wait
            norm = torch.hypot(norm, nn.utils.get_total_norm(grads).to(norm))
        if self.config.optim.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parts + own, self.config.optim.clip_norm, norm)
        return norm

    def _take_step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.student.zero_grad()

    def _optimizer_state(self) -> States:
        whole, states = dict(self.parameters), super()._optimizer_state()
        return {
            name: {key: shards.as_shard(value, whole[name]) if value.dim() else value for key, value in state.items()}
            for name, state in states.items()
        }

    def _load_optimizer(self, states: States) -> None:
        def cut(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
            return shards.local(shards.shard_like(value, like)) if value.shape == like.shape else value

        own = [(name, p) for name, p in self.parameters if name in states]
        super()._load_optimizer({name: {key: cut(value, p) for key, value in states[name].items()} for name, p in own})

    def whole_student(self) -> nn.Module:
        """Make a plain student in full precision that a rank can call. Collective."""
        network = copy.deepcopy(self._unfilled)
        state = {name: shards.whole(x) for name, x in self.student.state_dict().items()}
        network.load_state_dict(state, assign=True)
        return network.to(memory_format=torch.channels_last) if self.config.model.channels_last else network


def _without_weights(network: nn.Module) -> nn.Module:
    """Copy a network with its buffers, but with weights that take no memory."""
    meta = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), False) for p in network.parameters()}
    return copy.deepcopy(network, meta)
