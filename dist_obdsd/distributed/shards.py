"""Tensors of which each rank holds a shard (DTensor); others pass unchanged."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map

from dist_obdsd.distributed.collectives import broadcast_, met_by_all, rank, world_size
from dist_obdsd.errors import InputError


def device_mesh(kind: str, replicate: int = 1) -> Any:
    """Arrange the ranks to shard over, in ``replicate`` runs of them. Collective.

    Raises:
        InputError: on every rank, when ``replicate`` does not divide the number of ranks.
    """
    from torch.distributed.device_mesh import init_device_mesh

    W = world_size()
    if W % replicate:
        message = f"fsdp.replicate={replicate} does not divide the {W} ranks; set it to the number of nodes, or 1"
        raise met_by_all(InputError(message))
    if replicate == 1:
        return init_device_mesh(kind, (W,))
    return init_device_mesh(kind, (replicate, W // replicate), mesh_dim_names=("replicate", "shard"))


def is_sharded(x: Any) -> bool:
    """Tell if ``x`` is a DTensor, without importing its class, which takes seconds."""
    return isinstance(x, torch.Tensor) and hasattr(x, "device_mesh")


def local(x: Any) -> torch.Tensor:
    """Return this rank's shard, which shares its memory with ``x``."""
    return x.to_local() if is_sharded(x) else x


def shard_number(x: Any) -> str:
    """Number the shard that this rank holds; "" of a plain tensor."""
    if not is_sharded(x):
        return ""
    places = zip(x.device_mesh.get_coordinate(), x.placements, strict=True)
    return ".".join(str(number) for number, placement in places if not placement.is_replicate())


def whole(x: Any) -> torch.Tensor:
    """Gather a tensor from its shards. Collective."""
    return x.full_tensor() if is_sharded(x) else x


def whole_on_main(tree: Any) -> Any:
    """Gather a tree's sharded tensors onto rank 0's CPU; others get None. Collective."""

    def gathered(x: Any) -> Any:
        if not is_sharded(x):
            return x
        full = whole(x.detach())
        return full.cpu() if rank() == 0 else None

    return tree_map(gathered, tree)


def as_shard(part: torch.Tensor, like: Any) -> Any:
    """Take a plain tensor for this rank's shard, cut as ``like``. Not collective."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def shard_like(value: torch.Tensor, like: Any) -> torch.Tensor:
    """Cut this rank's shard out of a whole tensor, as ``like``. Not collective."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def shard_state(state: Mapping[str, torch.Tensor], network: nn.Module) -> Mapping[str, torch.Tensor]:
    """Cut a state dict's tensors up as those of ``network`` are. Not collective."""
    ours = network.state_dict()
    if not any(map(is_sharded, ours.values())):
        return state
    return {name: shard_like(value, ours.get(name)) for name, value in state.items()}


def broadcast_state(state: Mapping[str, torch.Tensor] | None, network: nn.Module) -> None:
    """Overwrite a network's tensors with rank 0's whole ``state``. Collective."""
    for name, tensor in network.state_dict().items():
        if state is None:
            value = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        else:
            value = state[name].to(tensor.device)
        broadcast_([value])
        tensor.copy_(shard_like(value, tensor))


def total_norm(parts: Sequence[torch.Tensor], mesh: Any) -> torch.Tensor:
    """Compute the norm of all sharded tensors together. Collective."""
    square = nn.utils.get_total_norm(list(parts)).square()
    dist.all_reduce(square, group=mesh.get_group(mesh.ndim - 1))
    return square.sqrt()
