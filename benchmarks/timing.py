"""Interleaved timing: machines are shared and drift, so rivals take turns and medians count."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping


def interleave(
    rivals: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 7,
    calls: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Return the median seconds per call of each rival.

    Args:
        rivals: Functions to time, called once each before timing starts.
        rounds: Timed turns of each rival; A B C A B C ...
        calls: Calls in one turn.
        clock: Seconds; `time.thread_time` leaves out what other processes took.
    """
    for function in rivals.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in rivals}
    enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, function in rivals.items():
                start = clock()
                for _ in range(calls):
                    function()
                times[name].append((clock() - start) / calls)
    finally:
        if enabled:
            gc.enable()
    return {name: statistics.median(values) for name, values in times.items()}
