"""When to draw: often while someone plays with the keys, seldom while nothing happens, less when drawing is dear."""

from __future__ import annotations

NORMAL, AFTER_KEY, IDLE = 0.25, 0.1, 1.0
"""Seconds between frames: usually, for `KEY_SECONDS` after a key, and when no event came."""
KEY_SECONDS = 2.0
DEAR = 0.010
"""A frame that takes longer than this (seconds) halves every rate."""
BUDGET = 0.008
"""Share of one core that the dashboard's thread may take: a pure Python loop waits for all of it (the GIL)."""
_FIRST = 3
"""Frames that are dearer than those to come: modules are loaded, every pane is drawn."""
LEAST = 0.3
"""Part of the budget that frames have, however many events come."""


class FrameRate:
    """Decides when the next frame is due. `now` is seconds of one monotonic clock, a cost is CPU seconds."""

    def __init__(self) -> None:
        self.cost = self.others = 0.0
        self._drawn = 0
        self._last = float("-inf")
        self._last_key = float("-inf")
        self._urgent = True

    @property
    def period(self) -> float:
        """Seconds between frames at the usual rate and the present cost."""
        budget = max(LEAST * BUDGET, BUDGET - self.others)
        return max(NORMAL * self._slowed, min(self.cost / budget, IDLE))

    @property
    def _slowed(self) -> int:
        return 2 if self.cost > DEAR else 1

    def key(self, now: float) -> None:
        """A key was pressed: draw at once, and quickly for a while."""
        self._last_key = now
        self._urgent = True

    def hurry(self) -> None:
        """Draw at the next opportunity (the window's size changed)."""
        self._urgent = True

    def due(self, now: float, fresh: bool) -> bool:
        """Return whether to draw now; `fresh` says that something changed since the last frame."""
        return self._urgent or now - self._last >= self._interval(now, fresh) * 0.98

    def drew(self, now: float, cost: float, others: float = 0.0) -> None:
        """A frame was drawn; `others` is the CPU time that the thread has spent on events since the one before."""
        if self._last > 0 and now > self._last:
            self.others += 0.2 * (others / (now - self._last) - self.others)
        self._last = now
        self._urgent = False
        # Frames that draw charts anew are dearer than those between; one of many should not decide.
        self._drawn += 1
        self.cost += (cost - self.cost) * (1.0 if self._drawn <= _FIRST else 0.2)

    def wait(self, now: float) -> float:
        """Return how long to sleep; the window's size is polled at least every `NORMAL` seconds."""
        return AFTER_KEY if self._playing(now) else min(NORMAL, max(0.05, self._last + self.period - now))

    def _interval(self, now: float, fresh: bool) -> float:
        if self._playing(now):
            return AFTER_KEY * self._slowed
        return self.period if fresh else max(IDLE * self._slowed, self.period)

    def _playing(self, now: float) -> bool:
        return now - self._last_key < KEY_SECONDS
