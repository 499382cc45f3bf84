"""How busy a node is: its CPU, memory and GPUs, under the names that MLflow's own monitor and UI use.

CPU and memory are read by psutil, GPUs by pynvml; what is not installed is not reported.
"""

import importlib
from typing import Any

MEGA = 1e6


class Usage:
    """Of the node that this process runs on."""

    def __init__(self) -> None:
        self._psutil = _psutil()
        if self._psutil is not None:
            self._psutil.cpu_percent()  # a share of the time since the call before, so the first says nothing
        self._gpus = _gpus()

    def read(self) -> dict[str, float]:
        """Percentages, megabytes (10^6 bytes) and watts, now or since the last reading."""
        numbers: dict[str, float] = {}
        if self._psutil is not None:
            memory = self._psutil.virtual_memory()
            numbers = {
                "cpu_utilization_percentage": self._psutil.cpu_percent(),
                "system_memory_usage_megabytes": memory.used / MEGA,
                "system_memory_usage_percentage": memory.percent,
            }
        for i, gpu in enumerate(self._gpus):
            numbers |= {f"gpu_{i}_{name}": value for name, value in _read_gpu(gpu).items()}
        return numbers


def by_node(readings: list[dict[str, float] | None]) -> dict[str, float]:
    """Metrics of all nodes from the readings of all ranks, of which one on each node has read something."""
    nodes = [reading for reading in readings if reading is not None]
    return {f"system/node-{n}/{name}": value for n, node in enumerate(nodes) for name, value in node.items()}


def _psutil() -> Any:
    """The module, or None where it is not installed."""
    try:
        return importlib.import_module("psutil")
    except ImportError:
        return None


def _gpus() -> list[object]:
    """Handles of the node's GPUs; none where there is no NVIDIA driver or no pynvml."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except Exception:
        return []


def _read_gpu(gpu: object) -> dict[str, float]:
    import pynvml

    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
        return {
            "utilization_percentage": pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
            "memory_usage_megabytes": memory.used / MEGA,
            "memory_usage_percentage": 100 * memory.used / memory.total,
            "power_usage_watts": pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
        }
    except pynvml.NVMLError:  # some cards do not tell everything
        return {}
