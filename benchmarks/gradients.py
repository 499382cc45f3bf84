"""The gradient across ranks beside one process's: ours, and that of losses that people use today.

    pip install lightly sentence-transformers open_clip_torch      # what is not installed is left out
    python -m benchmarks.gradients --worlds 2,4 --json gradients.json

Each loss sees the same unit rows. A rank's backward gives a gradient at its own rows, of which DDP's mean takes the
share 1 / W; that is compared with the gradient of the same loss in one process with the whole batch:

    error     |g - g*| / |g*|, 0 for an exact one
    factor    g.g* / |g*|^2: 1 for an exact one, 1/W where the gather lets no gradient through
    loss      mean of the ranks' losses / the loss of one process
"""

import copy
import importlib.metadata
import itertools
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from pytorch_metric_learning import losses as metric_learning
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from torch import nn

from benchmarks import common
from benchmarks.common import Row
from dist_obdsd import MarginLoss, MultiSimilarityLoss, OBDSDLoss, ProxyAnchorLoss
from dist_obdsd.distributed import collectives
from dist_obdsd.distributed.collectives import Group
from dist_obdsd.distributed.launch import Runtime

B, CLASSES, DIM = 48, 24, 16
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(rows, their labels) -> loss."""


def run(options: Namespace) -> list[Row]:
    return [row for W in options.worlds for row in common.run_case(run_rank, W, vars(options), W=W)]


def run_rank(rank: Runtime, case: dict[str, Any]) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, DIM, generator=generator, dtype=torch.float64).repeat_interleave(B // CLASSES, 0)
    noise = torch.randn(B, DIM, generator=generator, dtype=torch.float64)
    E_BD, labels_B = nn.functional.normalize(centres + noise, dim=1), torch.arange(B) // (B // CLASSES)
    W, b = rank.world_size, B // rank.world_size
    own = slice(rank.rank * b, (rank.rank + 1) * b)
    rows = []
    for library, name, whole, part in losses([dist.new_group([r]) for r in range(W)][rank.rank], own):
        whole_BD, part_bD = E_BD.clone().requires_grad_(), E_BD[own].clone().requires_grad_()
        expected, loss = whole(whole_BD, labels_B), part(part_bD, labels_B[own])
        expected.backward()
        loss.backward()
        found_BD, wanted_BD = collectives.gather_rows(part_bD.grad / W), whole_BD.grad
        rows.append(
            {
                "library": library, "loss": name,
                "error": float((found_BD - wanted_BD).norm() / wanted_BD.norm()),
                "factor": float((found_BD * wanted_BD).sum() / wanted_BD.square().sum()),
                "loss ratio": float(collectives.sum_across(loss) / W / expected.detach()),
            }
        )  # fmt: skip
    return rows


def losses(alone: Group, own: slice) -> Iterator[tuple[str, str, Loss, Loss]]:
    """Yield the losses of the libraries that are installed, in one process and for one rank's rows of several.

    Yields:
        library, name of the loss, the loss of the whole batch in the group ``alone``, and that of the ``own`` rows.
    """
    torch.manual_seed(0)  # proxies
    ours: dict[str, nn.Module] = {
        "MultiSimilarityLoss": MultiSimilarityLoss(),
        "MarginLoss": MarginLoss(classes=CLASSES).double(),
        "ProxyAnchorLoss": ProxyAnchorLoss(classes=CLASSES, embedding_dim=DIM).double(),
    }
    for name, loss in ours.items():
        yield "dist-obdsd", name, partial(copy.deepcopy(loss), group=alone), loss  # a copy has draws of its own
    T_BD = torch.randn(B, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    T_BD = nn.functional.normalize(T_BD)
    whole, part = (OBDSDLoss(MultiSimilarityLoss(), weight=30.0, group=group) for group in (alone, None))
    both = (lambda E, labels: whole(E, labels, T_BD).loss, lambda E, labels: part(E, labels, T_BD[own]).loss)
    yield "dist-obdsd", "OBDSDLoss (obdsd)", *both
    for kind, efficient in (("wrapper", False), ("wrapper, efficient", True)):
        for name in ("MultiSimilarityLoss", "ContrastiveLoss"):
            make = getattr(metric_learning, name)
            wrapped = DistributedLossWrapper(make(), efficient=efficient)
            yield _named("pytorch-metric-learning"), f"{name} ({kind})", make(), wrapped
    if find_spec("lightly"):
        from lightly.loss import NTXentLoss

        both = (_of_two_views(NTXentLoss(0.1, gather_distributed=gather)) for gather in (False, True))
        yield _named("lightly"), "NTXentLoss", *both
    if find_spec("sentence_transformers"):
        from sentence_transformers.losses import MultipleNegativesRankingLoss as Ranking

        several = (Ranking(nn.Identity(), gather_across_devices=gather) for gather in (False, True))
        both = (_of_two_views(lambda *views, of=of: of.compute_loss_from_embeddings([*views], None)) for of in several)
        yield _named("sentence-transformers"), "MultipleNegativesRankingLoss", *both
    if find_spec("open_clip"):
        from open_clip.loss import ClipLoss

        ranks = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
        for local_loss, with_grad in itertools.product((False, True), repeat=2):
            across = ClipLoss(local_loss=local_loss, gather_with_grad=with_grad, **ranks)
            kind = f"ClipLoss (local_loss={local_loss}, gather_with_grad={with_grad})"
            both = (_of_two_views(partial(loss, logit_scale=10.0)) for loss in (ClipLoss(), across))
            yield _named("open_clip_torch"), kind, *both


def _named(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"


def _of_two_views(loss: Callable[..., torch.Tensor]) -> Loss:
    """Call a loss of two views with the first and the second image of each class."""
    return lambda E_nD, labels_n: loss(E_nD[0::2], E_nD[1::2])


def main(arguments: list[str] | None = None) -> int:
    return common.main(common.parser(__doc__, worlds=[2, 4]), arguments, run)


if __name__ == "__main__":
    sys.exit(main())
