"""When to draw: often while someone plays with the keys, seldom while nothing happens, less when drawing is dear."""

from __future__ import annotations

import math

NORMAL, AFTER_KEY, IDLE = 0.25, 0.1, 1.0
"""Seconds between frames: usually, for `KEY_SECONDS` after a key, and when no event came."""
WHOLE = 1.0
"""Seconds between whole frames; those between, which say how far the run is, cost a quarter."""
KEY_SECONDS = 2.0
DEAR = 0.010
"""A frame that takes longer than this (seconds) halves every rate."""
BUDGET, BUDGET_WAITING = 0.008, 0.012
"""Share of one core that the dashboard's thread may take: while the process computes, which has to wait for all of it
(the GIL), and while it waits itself, for a GPU or for data."""
WAITING = 0.5
"""The process waits where its other threads take less than this share of one core."""
_FIRST = 3
"""Frames that are dearer than those to come: modules are loaded, every pane is drawn."""
_OPENING = 10
"""So many frames of a run that has only begun are whole."""
LEAST = 0.5
"""Part of the budget that frames have, however many events come."""


class FrameRate:
    """Decides when the next frame is due. `now` is seconds of one monotonic clock, a cost is CPU seconds."""

    def __init__(self) -> None:
        self.cost = self.others = 0.0
        self.busy = 1.0
        self._drawn = 0
        self._last = self._last_key = self._last_whole = -math.inf
        self._urgent = True

    @property
    def period(self) -> float:
        """Seconds between frames at the usual rate and the present cost."""
        allowed = BUDGET_WAITING if self.busy < WAITING else BUDGET
        budget = max(LEAST * allowed, allowed - self.others)
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
        usual = self.period if fresh else max(IDLE * self._slowed, self.period)
        interval = AFTER_KEY * self._slowed if self._playing(now) else usual
        return self._urgent or now - self._last >= interval * 0.98

    def whole(self, now: float) -> bool:
        """Return whether the next frame is to show everything."""
        early = self._drawn < _OPENING
        return early or self._urgent or self._playing(now) or now - self._last_whole >= WHOLE * 0.98

    def drew(self, now: float, cost: float, others: float = 0.0, busy: float = math.inf, *, whole: bool = True) -> None:
        """Take note of a frame.

        Args:
            now: Seconds of the clock.
            cost: CPU seconds that it took.
            whole: It showed everything.
            others: CPU seconds that this thread has spent on events since the frame before.
            busy: CPU seconds that the process's other threads have spent since then.
        """
        if self._last > 0 and now > self._last:
            self.others += 0.2 * (others / (now - self._last) - self.others)
            self.busy += 0.2 * (min(1.0, busy / (now - self._last)) - self.busy)
        self._last = now
        self._last_whole = now if whole else self._last_whole
        self._urgent = False
        # Frames that draw charts anew are dearer than those between; one of many should not decide.
        self._drawn += 1
        self.cost += (cost - self.cost) * (1.0 if self._drawn <= _FIRST else 0.2)

    def wait(self, now: float) -> float:
        """Return how long to sleep; the window's size is polled at least every `NORMAL` seconds."""
        return AFTER_KEY if self._playing(now) else min(NORMAL, max(0.05, self._last + self.period - now))

    def _playing(self, now: float) -> bool:
        return now - self._last_key < KEY_SECONDS
