"""`FakeClock`: time that passes only when told."""

from __future__ import annotations


class FakeClock:
    """Time that passes only when told; a stand-in for `learnit_r8.core.clock.Clock`.

    Args:
        now: Where `monotonic` starts, seconds.
        wall: Where `wall` starts, seconds since the Unix epoch.
    """

    def __init__(self, now: float = 0.0, wall: float = 1_700_000_000.0) -> None:
        self._now = float(now)
        self._offset = float(wall) - self._now
        self.slept: list[float] = []

    def monotonic(self) -> float:
        """Return seconds since some fixed moment."""
        return self._now

    def wall(self) -> float:
        """Return seconds since the Unix epoch."""
        return self._now + self._offset

    def sleep(self, seconds: float) -> None:
        """Let that much time pass, and note it in `slept`."""
        self.slept.append(seconds)
        self.advance(seconds)

    def advance(self, seconds: float) -> None:
        """Let time pass.

        Raises:
            ValueError: `seconds` is below 0.
        """
        if seconds < 0:
            raise ValueError(f"time does not go back, got {seconds} seconds")
        self._now += seconds
