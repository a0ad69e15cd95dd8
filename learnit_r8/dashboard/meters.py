"""What the machine does: this process's NVIDIA GPUs, and the load of CPU, memory and disk."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
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


class Meter(Generic[_Row]):
    """Takes readings at most every two seconds; none for ever once that has failed (no package, a lost device)."""

    def __init__(self, measure: Callable[..., Iterator[_Row]]) -> None:
        self._measure = measure
        self._readings: tuple[_Row, ...] = ()
        self._next = 0.0

    def read(self, *place: str) -> tuple[_Row, ...]:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _SECONDS
            try:
                self._readings = tuple(self._measure(*place))
            except Exception:
                self._readings, self._next = (), float("inf")
        return self._readings


def gpu_meter(environment: Mapping[str, str]) -> Meter[Gpu]:
    """Return what reads the GPUs that this process may use, where `nvidia-ml-py` is installed.

    Args:
        environment: CUDA_VISIBLE_DEVICES names them, by number or UUID; of several, LOCAL_RANK picks one.
    """

    @cache
    def devices(nvml: Any) -> list[Any]:
        nvml.nvmlInit()
        visible, rank = environment.get("CUDA_VISIBLE_DEVICES"), environment.get("LOCAL_RANK", "")
        if visible is None:
            visible = ",".join(map(str, range(min(_MOST, nvml.nvmlDeviceGetCount()))))
        names = list(filter(None, map(str.strip, visible.split(","))))
        if rank.isdigit() and int(rank) < len(names):
            names = [names[int(rank)]]
        by_number, by_uuid = nvml.nvmlDeviceGetHandleByIndex, nvml.nvmlDeviceGetHandleByUUID
        return [by_number(int(name)) if name.isdigit() else by_uuid(name) for name in names]

    def measure() -> Iterator[Gpu]:
        import pynvml as nvml

        for device in devices(nvml):
            memory = nvml.nvmlDeviceGetMemoryInfo(device)
            busy = nvml.nvmlDeviceGetUtilizationRates(device).gpu / 100
            celsius = nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU)
            yield Gpu(nvml.nvmlDeviceGetIndex(device), busy, celsius, memory.used, memory.total)

    return Meter(measure)


def host(folder: str) -> Iterator[tuple[str, str]]:
    """Yield the machine's load as (label, text) rows, where `psutil` is installed; the disk is the folder's."""
    import psutil

    process = _this_process()
    memory, own = psutil.virtual_memory(), process.memory_info().rss
    place = Path(folder).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    yield "cpu", f"{psutil.cpu_percent():.0f}% of {os.cpu_count()}   this run {process.cpu_percent():.0f}%"
    yield "ram", f"{memory.used / 2**30:.1f}/{memory.total / 2**30:.1f}G   this run {own / 2**30:.2f}G"
    yield "disk", f"{psutil.disk_usage(str(place)).free / 2**30:.0f}G free for checkpoints"


@cache
def _this_process() -> Any:
    import psutil

    process = psutil.Process()
    process.cpu_percent()  # the first call of each says nothing
    psutil.cpu_percent()
    return process
