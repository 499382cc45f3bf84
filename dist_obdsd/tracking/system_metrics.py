"""The load of a node's CPU, memory and GPUs, named as MLflow's UI expects."""

import importlib
from typing import Any

MEGA = 1e6


class SystemMetrics:
    """Reads its node's load by psutil and pynvml, as far as they are installed."""

    def __init__(self) -> None:
        self._psutil, self._pynvml = _module("psutil"), _module("pynvml")
        if self._psutil is not None:
            self._psutil.cpu_percent()  # a share of the time since the call before, so the first says nothing
        try:
            self._pynvml.nvmlInit()
            self._gpus = [self._pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(self._pynvml.nvmlDeviceGetCount())]
        except Exception:  # no pynvml, or no driver
            self._gpus = []

    def read(self) -> dict[str, float]:
        """Return percentages, megabytes (10^6 bytes) and watts since the last reading."""
        numbers: dict[str, float] = {}
        if self._psutil is not None:
            memory = self._psutil.virtual_memory()
            numbers = {
                "cpu_utilization_percentage": self._psutil.cpu_percent(),
                "system_memory_usage_megabytes": memory.used / MEGA,
                "system_memory_usage_percentage": memory.percent,
            }
        for i, gpu in enumerate(self._gpus):
            numbers |= {f"gpu_{i}_{name}": value for name, value in self._read_gpu(gpu).items()}
        return numbers

    def _read_gpu(self, gpu: object) -> dict[str, float]:
        nvml = self._pynvml
        try:
            memory = nvml.nvmlDeviceGetMemoryInfo(gpu)
            return {
                "utilization_percentage": nvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
                "memory_usage_megabytes": memory.used / MEGA,
                "memory_usage_percentage": 100 * memory.used / memory.total,
                "power_usage_watts": nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
            }
        except nvml.NVMLError:  # some cards do not report everything
            return {}


def by_node(readings: list[dict[str, float] | None]) -> dict[str, float]:
    """Name all ranks' readings by node; all but one rank of a node read None."""
    nodes = [reading for reading in readings if reading is not None]
    return {f"system/node-{n}/{name}": value for n, node in enumerate(nodes) for name, value in node.items()}


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
