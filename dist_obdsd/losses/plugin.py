"""A ranking loss of somebody else's package, by its import path."""

import inspect
from typing import Annotated, Any

from pydantic import Field

from dist_obdsd.config.registry import import_object
from dist_obdsd.errors import InputError
from dist_obdsd.losses.base import RankingLoss
from dist_obdsd.losses.gathered import GatheredLoss


def own_loss(
    name: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")],
    kwargs: dict[str, Any] = {},  # noqa: B006
    *,
    classes: int,
    embedding_dim: int,
) -> RankingLoss:
    """A loss of your own: a RankingLoss, or any module called with embeddings and labels of the whole batch.

    Args:
        name: ``package.module:Class``.
        kwargs: arguments of its constructor; ``classes`` and ``embedding_dim`` are filled in where it takes them.

    Raises:
        InputError: it cannot be imported, or not be made of these arguments.
    """
    make = import_object(name, "ranking.name")
    taken = inspect.signature(make).parameters
    filled = {"classes": classes, "embedding_dim": embedding_dim}
    try:
        loss = make(**{key: value for key, value in filled.items() if key in taken}, **kwargs)
    except TypeError as error:
        raise InputError(f"ranking.name={name} cannot be made of ranking.kwargs={kwargs}: {error}") from error
    if not callable(loss):
        raise InputError(
            f"ranking.name={name} made a {type(loss).__name__}, which cannot be called; give a loss's class"
        )
    return loss if isinstance(loss, RankingLoss) else GatheredLoss(loss)
