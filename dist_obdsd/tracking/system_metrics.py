"""The load of a node's CPU, memory and GPUs, named as MLflow's UI expects."""

from contextlib import suppress
from typing import Any

MEGA = 1e6


class SystemMetrics:
    """Reads its node's load by psutil and pynvml, as far as they are installed."""

    def __init__(self) -> None:
        self._psutil: Any = None
        self._gpus: list[Any] = []
        with suppress(ImportError):
            import psutil

            psutil.cpu_percent()  # a share of the time since the call before, so the first says nothing
            self._psutil = psutil
        with suppress(Exception):  # no pynvml, or no driver
            import pynvml

            self._nvml: Any = pynvml
            pynvml.nvmlInit()
            self._gpus = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]

    def read(self) -> dict[str, float]:
        """Return percentages, megabytes (10^6 bytes) and watts since the last reading."""
        numbers: dict[str, float] = {}
        if self._psutil is not None:
            memory = self._psutil.virtual_memory()
            numbers["cpu_utilization_percentage"] = self._psutil.cpu_percent()
            numbers["system_memory_usage_megabytes"] = memory.used / MEGA
            numbers["system_memory_usage_percentage"] = memory.percent
        for i, gpu in enumerate(self._gpus):
            nvml, name = self._nvml, f"gpu_{i}"
            with suppress(nvml.NVMLError):  # some cards do not report everything
                memory = nvml.nvmlDeviceGetMemoryInfo(gpu)
                numbers[f"{name}_memory_usage_megabytes"] = memory.used / MEGA
                numbers[f"{name}_memory_usage_percentage"] = 100 * memory.used / memory.total
                numbers[f"{name}_utilization_percentage"] = nvml.nvmlDeviceGetUtilizationRates(gpu).gpu
                numbers[f"{name}_power_usage_watts"] = nvml.nvmlDeviceGetPowerUsage(gpu) / 1000
        return numbers


def by_node(readings: list[dict[str, float] | None]) -> dict[str, float]:
    """Name all ranks' readings by node; all but one rank of a node read None."""
    nodes = [reading for reading in readings if reading is not None]
    return {f"system/node-{n}/{name}": value for n, node in enumerate(nodes) for name, value in node.items()}
