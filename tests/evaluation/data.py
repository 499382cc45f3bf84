"""Embeddings, easy and nasty, to search, to cluster and to measure.

Legend: N images, D embedding dimension.
"""

import functools

import torch
from torch.nn import functional

N, D = 90, 6
LABELS = torch.repeat_interleave(torch.arange(13) * 10 - 30, torch.arange(13) + 1)[:N]
"""Classes of 1, 2, 3, ... images."""
KINDS = (
    "random", "unit", "float64", "copies", "duplicates", "grid", "collapsed", "close", "sparse", "huge", "scales",
    "flat",
)  # fmt: skip
ROLES = {
    "query/gallery": ["query", "gallery", "gallery", "both"],
    "validation": ["train"],
    "cameras": ["query", "gallery:left", "gallery", "gallery:right-2", "both", "gallery:left"],
}
ALL = ("recall", "map@r", "r_precision", "map@1000", "map@c", "nmi", "f1", "distances", "rho_spectrum")
"""The metrics."""


@functools.cache
def rows(kind: str) -> torch.Tensor:
    """Rows [N, D] around the centre of their class, unless the kind says otherwise."""
    random = torch.Generator().manual_seed(KINDS.index(kind))
    x = torch.randn(13, D, generator=random)[LABELS // 10 + 3] + torch.randn(N, D, generator=random)
    match kind:
        case "unit":
            x = functional.normalize(x)
        case "float64":
            x = x.double() + 1e-12 * torch.randn(N, D, dtype=torch.float64, generator=random)
        case "copies":  # of a row more than there are spare candidates, and fewer points than clusters
            x = x[torch.arange(N) % 6]
        case "duplicates":  # one image in fifteen is there twice
            x[: N // 15] = x[N // 15 : 2 * (N // 15)]
        case "grid":  # so coarse that many scores and distances tie
            x = (x * 2).round() / 2
        case "collapsed":
            x = torch.full_like(x, 0.3)
        case "close":  # apart by less than float32 sums can tell
            x = 0.3 + (x * 4).round() * 2.0**-24
        case "sparse":  # zero rows, and half of the scores exactly 0
            x = x * (torch.rand(N, D, generator=random) < 0.3)
        case "huge":
            x = x.double() * 1e10
        case "scales":
            x = x * 10.0 ** torch.randint(-3, 4, (N, 1), generator=random)
        case "flat":  # two dimensions are never used
            x[:, 2:4] = 0
    return x


@functools.cache
def images(kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str]]:
    """(unit rows [N, D], ids, labels, roles) in some order; ``kind`` is one of the rows or of the roles."""
    roles = (ROLES.get(kind, ["both"]) * N)[:N]
    if len(set(roles)) > 1:
        roles[0] = "query"  # the class of one image is asked for, in vain
    unit = functional.normalize(rows("random" if kind in ROLES else kind))
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    return unit[order], 1000 - torch.arange(N), LABELS[order], [roles[i] for i in order.tolist()]
