"""The gradient across ranks beside one process's: ours, and that of losses that people use today.

    pip install lightly sentence-transformers open_clip_torch      # what is not installed is left out
    python -m benchmarks.gradients --worlds 2,4 --json gradients.json

Each loss sees the same unit rows. A rank's backward gives a gradient at its own rows, of which DDP's mean takes the
share 1 / W; that is compared with the gradient of the same loss in one process with the whole batch:

    error     |g - g*| / |g*|, 0 for an exact one
    factor    g.g* / |g*|^2: 1 for an exact one, 1/W where the gather lets no gradient through
    loss      mean of the ranks' losses / the loss of one process
"""

import importlib.metadata
import itertools
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from pytorch_metric_learning import losses
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from torch import nn

from benchmarks import common
from benchmarks.common import Row
from dist_obdsd import MarginLoss, MultiSimilarityLoss, OBDSDLoss, ProxyAnchorLoss
from dist_obdsd.distributed import collectives
from dist_obdsd.distributed.collectives import Group
from dist_obdsd.distributed.launch import Runtime

B, CLASSES, DIM = 48, 24, 16
Way = Callable[[torch.Tensor, torch.Tensor, bool], torch.Tensor]
"""(rows, their labels, whether they are one rank's of several) -> loss."""


def run(options: Namespace) -> list[Row]:
    return [row for W in options.worlds for row in common.run_case(run_rank, W, {"threads": options.threads})]


def run_rank(rank: Runtime, case: dict[str, Any]) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, DIM, generator=generator, dtype=torch.float64).repeat_interleave(B // CLASSES, 0)
    noise = torch.randn(B, DIM, generator=generator, dtype=torch.float64)
    E_BD, labels_B = nn.functional.normalize(centres + noise, dim=1), torch.arange(B) // (B // CLASSES)
    W, b = rank.world_size, B // rank.world_size
    own = slice(rank.rank * b, (rank.rank + 1) * b)
    rows = []
    for library, name, way in ways([dist.new_group([r]) for r in range(W)][rank.rank]):
        whole_BD, part_bD = E_BD.clone().requires_grad_(), E_BD[own].clone().requires_grad_()
        expected = way(whole_BD, labels_B, False)
        expected.backward()
        loss = way(part_bD, labels_B[own], True)
        loss.backward()
        found_BD, wanted_BD = collectives.gather_rows(part_bD.grad / W), whole_BD.grad
        rows.append(
            {
                "ranks": W, "library": library, "loss": name,
                "error": float((found_BD - wanted_BD).norm() / wanted_BD.norm()),
                "factor": float((found_BD * wanted_BD).sum() / wanted_BD.square().sum()),
                "loss ratio": float(collectives.sum_across(loss) / W / expected.detach()),
            }
        )  # fmt: skip
    return rows


def ways(alone: Group) -> Iterator[tuple[str, str, Way]]:
    """Yield the losses of the libraries that are installed, as (library, loss, way).

    Args:
        alone: a process group of this rank alone.
    """
    torch.manual_seed(0)  # proxies
    ours: dict[str, nn.Module] = {
        "MultiSimilarityLoss": MultiSimilarityLoss(),
        "MarginLoss": MarginLoss(classes=CLASSES).double(),
        "ProxyAnchorLoss": ProxyAnchorLoss(classes=CLASSES, embedding_dim=DIM).double(),
    }
    for name, loss in ours.items():
        yield "dist-obdsd", name, _ours(loss, alone)
    yield "dist-obdsd", "OBDSDLoss (obdsd)", _obdsd(alone)
    for kind, efficient in (("wrapper", False), ("wrapper, efficient", True)):
        for name in ("MultiSimilarityLoss", "ContrastiveLoss"):
            plain = getattr(losses, name)()
            wrapped = DistributedLossWrapper(getattr(losses, name)(), efficient=efficient)
            yield _named("pytorch-metric-learning"), f"{name} ({kind})", _either(plain, wrapped)
    if find_spec("lightly"):
        from lightly.loss import NTXentLoss

        yield _named("lightly"), "NTXentLoss", _pairs(NTXentLoss(0.1), NTXentLoss(0.1, gather_distributed=True))
    if find_spec("sentence_transformers"):
        from sentence_transformers.losses import MultipleNegativesRankingLoss as Ranking

        plain, gathered = (Ranking(nn.Identity(), gather_across_devices=gather) for gather in (False, True))
        both = (lambda a, p, loss=loss: loss.compute_loss_from_embeddings([a, p], None) for loss in (plain, gathered))
        yield _named("sentence-transformers"), "MultipleNegativesRankingLoss", _pairs(*both)
    if find_spec("open_clip"):
        from open_clip.loss import ClipLoss

        ranks = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
        for local_loss, with_grad in itertools.product((False, True), repeat=2):
            several = ClipLoss(local_loss=local_loss, gather_with_grad=with_grad, **ranks)
            kind = f"ClipLoss (local_loss={local_loss}, gather_with_grad={with_grad})"
            both = (lambda a, p, loss=loss: loss(a, p, 10.0) for loss in (ClipLoss(), several))
            yield _named("open_clip_torch"), kind, _pairs(*both)


def _named(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"


def _ours(loss: Any, alone: Group) -> Way:
    def way(E_nD: torch.Tensor, labels_n: torch.Tensor, several: bool) -> torch.Tensor:
        loss.calls = 0  # of the draws
        value: torch.Tensor = loss(E_nD, labels_n, group=None if several else alone)
        return value

    return way


def _obdsd(alone: Group) -> Way:
    loss = OBDSDLoss(MultiSimilarityLoss(), weight=30.0)
    teacher_BD = torch.randn(B, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    teacher_BD = nn.functional.normalize(teacher_BD)

    def way(E_nD: torch.Tensor, labels_n: torch.Tensor, several: bool) -> torch.Tensor:
        loss.group = None if several else alone
        first = dist.get_rank() * len(E_nD) if several else 0
        return loss(E_nD, labels_n, teacher_BD[first : first + len(E_nD)]).loss

    return way


def _either(plain: Callable[..., torch.Tensor], several: Callable[..., torch.Tensor]) -> Way:
    return lambda E_nD, labels_n, across: (several if across else plain)(E_nD, labels_n)


def _pairs(plain: Callable[..., torch.Tensor], several: Callable[..., torch.Tensor]) -> Way:
    """Call a loss of two views with the first and the second image of each class."""
    return lambda E_nD, labels_n, across: (several if across else plain)(E_nD[0::2], E_nD[1::2])


def main(arguments: list[str] | None = None) -> int:
    return common.main(common.parser(__doc__, worlds=(2, 4)), arguments, run)


if __name__ == "__main__":
    sys.exit(main())
