"""Random numbers that depend on a seed and on their place alone, drawn for any block of rows.

Legend: b rows of this rank, B rows of the global batch.
"""

import torch

_GAMMA, _FIRST, _SECOND = (x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def uniforms(seed: int, rows: slice, B: int, device: torch.device) -> torch.Tensor:
    """Draw rows [b, B] of the batch's [B, B] uniform numbers in [0, 1), multiples of 2^-32, in float64.

    SplitMix64 (Steele et al., OOPSLA 2014) with the entry's number as its state's: any rank draws its own rows of the
    same matrix, on any device, without the memory for the whole of it.
    """
    numbers_bB = torch.arange(rows.start * B, rows.stop * B, device=device).view(-1, B)
    x_bB = (numbers_bB + 1) * _GAMMA + (seed % 2**63)  # int64 wraps around
    x_bB = (x_bB ^ _shift(x_bB, 30)) * _FIRST
    x_bB = (x_bB ^ _shift(x_bB, 27)) * _SECOND
    return _shift(x_bB ^ _shift(x_bB, 31), 32).double() / 2**32


def _shift(x_bB: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift to the right and fill up with zeros; torch's own shift would copy the sign."""
    return (x_bB >> bits) & (2 ** (64 - bits) - 1)
