"""Randomness is derived, not carried.

Every random choice draws from a generator made from the run's seed and the *name* of the choice, such as
``rng(seed, "augment", epoch, step, row)``. Nothing depends on what ran before, on the rank or on the worker, so a
checkpoint needs no generator state and a run resumed anywhere draws what the unbroken run would have drawn.
"""

import hashlib

import numpy as np


def derive(seed: int, *names: int | str) -> int:
    """Derive a 63-bit integer from a seed and names alone, by SHA-256 of their text."""
    text = "\x1f".join([str(seed), *(f"{type(name).__name__}:{name}" for name in names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def rng(seed: int, *names: int | str) -> np.random.Generator:
    """Make a fresh generator for the choice that ``names`` names."""
    return np.random.Generator(np.random.PCG64(derive(seed, *names)))
