"""The one place that reads clocks, so that tests can bring their own."""

from __future__ import annotations

import time


class Clock:
    """Real time. `learnit_r8.testing.FakeClock` has the same methods."""

    def monotonic(self) -> float:
        """Return seconds since some fixed moment; never goes back."""
        return time.perf_counter()

    def wall(self) -> float:
        """Return seconds since the Unix epoch."""
        return time.time()  # noqa: TID251 - this is that place

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)
