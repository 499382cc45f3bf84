"""Embeddings that the objective's tests share.

Legend: B rows, D embedding dimension.
"""

import torch
from torch.nn import functional

B, D = 12, 6


def unit_rows(seed: int, rows: int = B, dim: int = D, spread: float = 1.0) -> torch.Tensor:
    """Float64 unit rows; a small ``spread`` gathers them around one direction."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, dim, dtype=torch.float64, generator=generator)
    centre = torch.ones(dim, dtype=torch.float64)
    return functional.normalize(centre * (1 - spread) + noise * spread, dim=1)


def clustered(seed: int, rows: int = 112, dim: int = 128, likeness: float = 0.7) -> torch.Tensor:
    """Float32 unit rows in pairs of one class, ``likeness`` their cosine: such as a trained teacher makes them."""
    generator = torch.Generator().manual_seed(seed)
    centres_nD, own_nD = (
        functional.normalize(torch.randn(n, dim, generator=generator), dim=1) for n in (rows // 2, rows)
    )
    return functional.normalize(
        likeness**0.5 * centres_nD.repeat_interleave(2, 0) + (1 - likeness) ** 0.5 * own_nD, dim=1
    )


def manifolds() -> dict[str, torch.Tensor]:
    """Teacher batches, easy and nasty."""
    ordinary = unit_rows(0)
    tight = unit_rows(1, spread=0.2)
    duplicates = tight.clone()
    duplicates[1::2] = functional.normalize(duplicates[::2] + 1e-5 * unit_rows(2)[::2], dim=1)
    outliers = tight.clone()
    outliers[3] = -tight.mean(0) / tight.mean(0).norm()
    outliers[7] = functional.normalize(unit_rows(3)[0] - 0.7 * tight.mean(0), dim=0)
    both = outliers.clone()
    both[1] = both[0]
    both[4] = functional.normalize(both[3] + 1e-3 * unit_rows(4)[0], dim=0)
    return {
        "ordinary": ordinary,
        "tight": tight,
        "duplicates": duplicates,
        "outliers": outliers,
        "both": both,
        "equal": tight[:1].repeat(B, 1),
        "opposed": torch.cat([-tight[:1], tight[:1].repeat(B - 1, 1)]),
    }
