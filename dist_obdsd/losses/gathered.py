"""Any loss module of a whole batch, computed by every rank on the gathered one.

Such a loss may depend on all rows at once. With the gather's gradients summed over the ranks and DDP's mean, that is
exact; it costs every rank what one process would pay.

Legend: B rows of the global batch, D embedding dimension.
"""

import inspect
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from dist_obdsd.config.registry import import_object
from dist_obdsd.errors import InputError
from dist_obdsd.losses.base import LearnableLoss, RankingLoss, graph_zero
from dist_obdsd.losses.batch_view import BatchView, PartialMean
from dist_obdsd.rng import derive


class GatheredLoss(LearnableLoss):
    """A loss called with embeddings [B, D], labels [B]: a scalar, or one a row.

    What it draws from torch's generators is the same on every rank, and another in each step.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def partial_means(self, view: BatchView) -> dict[str, PartialMean]:
        E_BD = view.E_BD.to(torch.promote_types(view.E_BD.dtype, torch.float32))
        generators = torch.random.fork_rng(devices=[E_BD.device] if E_BD.is_cuda else [])
        with torch.autocast(E_BD.device.type, enabled=False), generators:
            torch.manual_seed(derive(view.seed, "miner"))
            # A row that is not finite would stop some losses; here the sum tells of it.
            loss = self.whole_loss(E_BD.nan_to_num(0, 0, 0), view).sum() + graph_zero(view)
        # What a loss remembers of a step (a histogram, say) must not hold on to the step's graph.
        for module in self.loss.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.detach())
        loss = loss + sum(((parameter * 0).sum() for parameter in self.parameters()), 0.0)
        # All W ranks compute the same: L/W from each adds up to L.
        return {"ranking": PartialMean(loss / view.world_size, torch.full_like(loss.detach(), 1 / view.world_size))}

    def whole_loss(self, E_BD: torch.Tensor, view: BatchView, *more: Any) -> torch.Tensor:
        """Call the module, with parameters whose gradients are averaged over the ranks."""
        if view.world_size == 1:
            loss: torch.Tensor = self.loss(E_BD, view.labels_B, *more)
            return loss
        shared = {name: view.shared(parameter) for name, parameter in self.loss.named_parameters()}
        return torch.func.functional_call(self.loss, shared, (E_BD, view.labels_B, *more))


def own_loss(
    name: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")],
    kwargs: dict[str, Any] = {},  # noqa: B006
    *,
    classes: int,
    embedding_dim: int,
) -> RankingLoss:
    """A loss of your own: a RankingLoss, or a module of embeddings and labels.

    Args:
        name: ``package.module:Class``.
        kwargs: arguments of its constructor; ``classes`` and ``embedding_dim`` are filled in where it takes them.

    Raises:
        InputError: it cannot be imported, or not be made of these arguments.
    """
    make = import_object(name, "ranking.name")
    takes = inspect.signature(make)
    filled = {"classes": classes, "embedding_dim": embedding_dim}
    arguments = {key: value for key, value in filled.items() if key in takes.parameters} | kwargs
    try:
        takes.bind(**arguments)
    except TypeError as error:
        raise InputError(f"ranking.name={name} cannot be made of ranking.kwargs={kwargs}: {error}") from error
    loss = make(**arguments)
    if not callable(loss):
        raise InputError(
            f"ranking.name={name} made a {type(loss).__name__}, which cannot be called; give a loss's class"
        )
    return loss if isinstance(loss, RankingLoss) else GatheredLoss(loss)
