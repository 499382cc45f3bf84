"""Cores and memory of this process. Imports nothing heavy."""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def usable_cores() -> int:
    """Count the CPU cores that this process may run on; a container or launcher may allow fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tune_malloc() -> None:
    """Let glibc keep what this process frees instead of handing it back to the kernel. Elsewhere nothing happens.

    A network's activations on a CPU are buffers of many MiB, which malloc maps anew at every step and the kernel fills
    with zeros, page by page: a fifth of a step's time. For processes that take the same steps over and over; others
    would keep their peak for nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
