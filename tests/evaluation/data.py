"""Embeddings to search and to cluster, easy and nasty.

Legend: N rows, D embedding dimension.
"""

import functools

import torch
from torch.nn import functional

N, D = 120, 5
KINDS = ("random", "unit", "float64", "copies", "duplicates", "grid", "collapsed", "close", "sparse", "huge", "scales")


@functools.cache
def rows(kind: str) -> torch.Tensor:
    """Rows [N, D] around eleven centres, unless the kind says otherwise."""
    random = torch.Generator().manual_seed(KINDS.index(kind))
    x = torch.randn(11, D, generator=random)[torch.arange(N) * 7 % 11] + 0.5 * torch.randn(N, D, generator=random)
    match kind:
        case "unit":
            x = functional.normalize(x)
        case "float64":
            x = x.double() + 1e-12 * torch.randn(N, D, dtype=torch.float64, generator=random)
        case "copies":  # of a row more than there are spare candidates, and fewer points than clusters
            x = x[torch.arange(N) % 6]
        case "duplicates":  # one image in twenty is there twice
            x[: N // 20] = x[N // 20 : 2 * (N // 20)]
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
    return x
