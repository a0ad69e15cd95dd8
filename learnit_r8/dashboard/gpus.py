"""What the driver says of this process's NVIDIA GPUs; nothing where there is none, or no `nvidia-ml-py`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

_SECONDS = 2.0
_MOST = 8


class Gpu(NamedTuple):
    """One reading: share of time busy (0 to 1), degrees Celsius, bytes in use and in all."""

    number: int
    busy: float
    celsius: int
    used: int
    total: int


class GpuMeter:
    """Reads the GPUs that this process may use, at most every two seconds.

    Args:
        environment: CUDA_VISIBLE_DEVICES names them, by number or UUID; of several, LOCAL_RANK picks one.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._visible = environment.get("CUDA_VISIBLE_DEVICES")
        self._rank = environment.get("LOCAL_RANK", "")
        self._devices: list[Any] | None = None
        self._readings: tuple[Gpu, ...] = ()
        self._next = 0.0

    def read(self) -> tuple[Gpu, ...]:
        """Return the newest readings; empty for ever once the driver has failed."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _SECONDS
            try:
                self._readings = tuple(self._measure())
            except Exception:  # no package, no driver, a lost device: a row less
                self._readings, self._devices = (), []
        return self._readings

    def _measure(self) -> list[Gpu]:
        if self._devices == []:
            return []
        import pynvml as nvml

        if self._devices is None:
            nvml.nvmlInit()
            self._devices = self._own(nvml)
        found = []
        for device in self._devices:
            memory = nvml.nvmlDeviceGetMemoryInfo(device)
            busy = nvml.nvmlDeviceGetUtilizationRates(device).gpu / 100
            celsius = nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU)
            found.append(Gpu(nvml.nvmlDeviceGetIndex(device), busy, celsius, memory.used, memory.total))
        return found

    def _own(self, nvml: Any) -> list[Any]:
        if self._visible is None:
            devices = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(min(_MOST, nvml.nvmlDeviceGetCount()))]
        else:
            devices = [
                nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else nvml.nvmlDeviceGetHandleByUUID(name)
                for name in filter(None, map(str.strip, self._visible.split(",")))
            ]
        if self._rank.isdigit() and int(self._rank) < len(devices):
            devices = [devices[int(self._rank)]]
        return devices
