"""The losses and miners of pytorch-metric-learning, by name.

Legend: B rows of the global batch, C classes, D embedding dimension.
"""

import copy
import difflib
import importlib
import inspect
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from dist_obdsd.errors import InputError, RunError
from dist_obdsd.losses.batch_view import BatchView
from dist_obdsd.losses.gathered import GatheredLoss

REFUSED = {
    "CrossBatchMemory": "it compares with embeddings of earlier steps, which a resumed run would not have",
    "SelfSupervisedLoss": "it wants two views of every image",
    "MultipleLosses": "it is made of other losses, which a configuration cannot hold",
    "ManifoldLoss": "it takes no labels",
    "VICRegLoss": "it takes no labels",
    "SmoothAPLoss": "it is wrong unless a batch holds as many classes as images of each; take FastAPLoss",
    "EmbeddingsAlreadyPackagedAsTriplets": "batches here come in groups of one class",
}
PARTS = {"distance": "distances", "reducer": "reducers"}
ABSTRACT = ("BaseMetricLossFunction", "BaseLossWrapper", "GenericPairLoss", "BaseMiner")


class PMLLoss(GatheredLoss):
    """Any loss of pytorch-metric-learning, with a miner of it if one is given.

    >>> ranking = PMLLoss("pml.ArcFaceLoss", {"margin": 20}, classes=4, embedding_dim=16)
    >>> loss = ranking(embeddings, labels)

    Raises:
        InputError: the library is missing, or a name or an argument is unknown, or fails on a small batch.
    """

    def __init__(
        self,
        name: Annotated[str, Field(pattern=r"^pml\.\w+$")],
        kwargs: dict[str, Any] = {},  # noqa: B006
        miner: Annotated[str, Field(pattern=r"^pml\.\w+$")] | None = None,
        miner_kwargs: dict[str, Any] = {},  # noqa: B006
        *,
        classes: int,
        embedding_dim: int,
    ) -> None:
        """
        Args:
            name: ``pml.`` and the loss's name there, such as ``pml.ArcFaceLoss``.
            kwargs: arguments of its constructor; the number of classes and the embedding's length are filled in.
            miner: a miner there, such as ``pml.MultiSimilarityMiner``.
            miner_kwargs: arguments of the miner's constructor.
        """
        sizes = {"num_classes": classes, "embedding_size": embedding_dim, "descriptors_dim": embedding_dim}
        super().__init__(_build("losses", "ranking", name, kwargs, sizes))
        self.name, self.num_classes = name, classes
        self.miner = None
        if miner is not None:
            self.miner = _build("miners", "ranking.miner", miner, miner_kwargs, sizes)
        elif miner_kwargs:
            raise InputError("ranking.miner_kwargs are given without a miner; set ranking.miner=pml.NAME or leave them")
        self._try(classes, embedding_dim)

    def whole_loss(self, E_BD: torch.Tensor, view: BatchView, *more: Any) -> torch.Tensor:
        """Call the library, or raise RunError, on every rank alike, if it refuses a batch."""
        try:
            pairs = self.miner(E_BD, view.labels_B) if self.miner is not None else None
            return super().whole_loss(E_BD, view, pairs)
        except (ValueError, AssertionError) as error:
            raise RunError(f"{self.name} refused a batch: {error}") from error

    def _try(self, classes: int, embedding_dim: int) -> None:
        """Run once on a small batch, to know before training if it works."""
        trial = copy.deepcopy(self)
        labels_B = torch.arange(min(classes, 4)).repeat_interleave(2)
        E_BD = torch.randn(len(labels_B), embedding_dim, generator=torch.Generator().manual_seed(0))
        E_BD = nn.functional.normalize(E_BD, dim=1).requires_grad_()
        try:
            (term,) = trial.partial_means(BatchView(E_BD, E_BD, labels_B, 0)).values()
            term.sum.backward()
        except Exception as error:
            reason = error.__cause__ or error
            chosen = f"ranking.name={self.name}" + ("" if self.miner is None else f" with {type(self.miner).__name__}")
            raise InputError(
                f"{chosen} does not work with these settings: {type(reason).__name__}: {reason}; change ranking.kwargs "
                f"or take another loss"
            ) from error


def _build(kind: str, key: str, given: str, kwargs: dict[str, Any], sizes: dict[str, int]) -> nn.Module:
    """Make one of the library's losses or miners, with sizes and parts filled in."""
    found = _find(kind, f"{key}.name" if kind == "losses" else key, given)
    arguments = f"{key}.kwargs" if kind == "losses" else f"{key}_kwargs"
    takes = {name for base in inspect.getmro(found) for name in inspect.signature(base).parameters}
    filled = {name: size for name, size in sizes.items() if name in takes} | kwargs
    for name, value in kwargs.items():
        if isinstance(value, str) and value.startswith("pml."):  # such as a distance, made with its defaults
            filled[name] = _find(PARTS.get(name, "regularizers"), f"{arguments}.{name}", value)()
    try:
        built: nn.Module = found(**filled)
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(
            f"{arguments}: {given} cannot be made of {filled}: {error}; see its documentation for what it takes"
        ) from error
    # The library keeps some tensors as plain attributes. As buffers they move to the GPU and into checkpoints.
    for module in built.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor):
                delattr(module, name)
                module.register_buffer(name, value)
    return built


def _find(kind: str, key: str, given: str) -> Any:
    """Find the class that ``pml.NAME`` names."""
    try:
        module, name = importlib.import_module(f"pytorch_metric_learning.{kind}"), given.removeprefix("pml.")
    except ImportError as error:
        raise InputError(
            f"a pml. name needs pytorch-metric-learning, which cannot be imported ({error}); "
            f"pip install pytorch-metric-learning"
        ) from error
    if name in REFUSED:
        raise InputError(f"{key}={given} cannot work here: {REFUSED[name]}")
    names = [
        name for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, nn.Module) and name not in REFUSED and name not in ABSTRACT
    ]  # fmt: skip
    if name not in names:
        near = " or ".join(f"pml.{n}" for n in difflib.get_close_matches(name, names, cutoff=0))
        raise InputError(
            f"{key} is {given}, which pytorch-metric-learning does not have among its {kind}; did you mean {near}?"
        )
    return getattr(module, name)
