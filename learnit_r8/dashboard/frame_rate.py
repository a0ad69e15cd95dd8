"""When to draw: often while someone plays with the keys, seldom while nothing happens, less when drawing is dear."""

from __future__ import annotations

NORMAL, AFTER_KEY, IDLE = 0.25, 0.1, 1.0
"""Seconds between frames: usually, for `KEY_SECONDS` after a key, and when no event came."""
KEY_SECONDS = 2.0
DEAR = 0.010
"""A frame that takes longer than this (seconds) halves the rate."""


class FrameRate:
    """Decides when the next frame is due. All times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        self.cost = 0.0
        self._last = float("-inf")
        self._last_key = float("-inf")
        self._urgent = True

    @property
    def period(self) -> float:
        """Seconds between frames at the usual rate and the present cost."""
        return NORMAL * (2 if self.cost > DEAR else 1)

    def key(self, now: float) -> None:
        """A key was pressed: draw at once, and quickly for a while."""
        self._last_key = now
        self._urgent = True

    def hurry(self) -> None:
        """Draw at the next opportunity (the window's size changed)."""
        self._urgent = True

    def due(self, now: float, fresh: bool) -> bool:
        """Return whether to draw now; `fresh` says that something changed since the last frame."""
        if self._urgent:
            return True
        slowed = 2 if self.cost > DEAR else 1
        usual = AFTER_KEY if now - self._last_key < KEY_SECONDS else NORMAL if fresh else IDLE
        return now - self._last >= usual * slowed * 0.98

    def drew(self, started: float, ended: float) -> None:
        """A frame was drawn."""
        self._last = started
        self._urgent = False
        # Half of the newest: one frame that was interrupted by the training thread should not count as dear.
        self.cost = (self.cost + (ended - started)) / 2 if self.cost else ended - started

    def wait(self, now: float) -> float:
        """Return how long to sleep; the window's size is polled at least every `NORMAL` seconds."""
        return AFTER_KEY if now - self._last_key < KEY_SECONDS else NORMAL
