"""What this process may use of its machine. Imports nothing heavy."""

import os


def usable_cores() -> int:
    """CPU cores that this process may run on; fewer than the machine has, where a container or launcher says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
