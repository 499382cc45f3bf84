"""Cores and memory of this process. Imports nothing heavy."""

import ctypes
import gc
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def usable_cores() -> int:
    """Count the CPU cores that this process may run on, perhaps not all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_collecting() -> None:
    """Collect garbage from here on, where that was put off, but not what is there.

    torch and what it brings along are a million objects that stay. Looking through them takes a fifth of the time that
    their import takes, and more in the first epochs.
    """
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def tune_malloc() -> None:
    """Let glibc keep what this process frees, for the same steps over and over.

    Else malloc maps a network's activations anew at every step, and the kernel fills them with zeros, page by page: a
    fifth of a step's time on a CPU. Where there is no glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
