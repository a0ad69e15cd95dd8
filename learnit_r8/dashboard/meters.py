"""What the machine does: this process's NVIDIA GPUs, and the load of CPU, memory and disk."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

_SECONDS = 2.0
_MOST = 8
_Row = TypeVar("_Row")


class Gpu(NamedTuple):
    """One reading: share of time busy (0 to 1), degrees Celsius, bytes in use and in all."""

    number: int
    busy: float
    celsius: int
    used: int
    total: int


class _Meter(Generic[_Row]):
    """Takes readings at most every two seconds; none for ever once that has failed (no package, a lost device)."""

    _readings: tuple[_Row, ...] = ()
    _next = 0.0

    def read(self) -> tuple[_Row, ...]:
        """Return the newest readings."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _SECONDS
            try:
                self._readings = tuple(self._measure())
            except Exception:
                self._readings, self._next = (), float("inf")
        return self._readings

    def _measure(self) -> Iterable[_Row]:
        raise NotImplementedError


class GpuMeter(_Meter[Gpu]):
    """Reads the GPUs that this process may use, where `nvidia-ml-py` is installed.

    Args:
        environment: CUDA_VISIBLE_DEVICES names them, by number or UUID; of several, LOCAL_RANK picks one.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._visible = environment.get("CUDA_VISIBLE_DEVICES")
        self._rank = environment.get("LOCAL_RANK", "")
        self._devices: list[Any] | None = None

    def _measure(self) -> Iterable[Gpu]:
        import pynvml as nvml

        if self._devices is None:
            nvml.nvmlInit()
            self._devices = self._own(nvml)
        for device in self._devices:
            memory = nvml.nvmlDeviceGetMemoryInfo(device)
            busy = nvml.nvmlDeviceGetUtilizationRates(device).gpu / 100
            celsius = nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU)
            yield Gpu(nvml.nvmlDeviceGetIndex(device), busy, celsius, memory.used, memory.total)

    def _own(self, nvml: Any) -> list[Any]:
        if self._visible is None:
            names = list(map(str, range(min(_MOST, nvml.nvmlDeviceGetCount()))))
        else:
            names = list(filter(None, map(str.strip, self._visible.split(","))))
        if self._rank.isdigit() and int(self._rank) < len(names):
            names = [names[int(self._rank)]]
        return [
            nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else nvml.nvmlDeviceGetHandleByUUID(name)
            for name in names
        ]


class HostMeter(_Meter[tuple[str, str]]):
    """Reads the machine's load as (label, text) rows, where `psutil` is installed.

    Attributes:
        folder: The disk that is looked at is this folder's.
    """

    folder = "."
    _process: Any = None

    def _measure(self) -> Iterable[tuple[str, str]]:
        import psutil

        if self._process is None:
            self._process = psutil.Process()
            self._process.cpu_percent()
            psutil.cpu_percent()
        memory, own = psutil.virtual_memory(), self._process.memory_info().rss
        place = Path(self.folder).absolute()
        while not place.exists() and place != place.parent:
            place = place.parent
        yield "cpu", f"{psutil.cpu_percent():.0f}% of {os.cpu_count()}   this run {self._process.cpu_percent():.0f}%"
        yield "ram", f"{memory.used / 2**30:.1f}/{memory.total / 2**30:.1f}G   this run {own / 2**30:.2f}G"
        yield "disk", f"{psutil.disk_usage(str(place)).free / 2**30:.0f}G free for checkpoints"
