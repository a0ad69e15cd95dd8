"""The largest of the numbers reported lately, and so what a new experience may weigh."""

from __future__ import annotations

from typing import Any

_PARTS = 8
"""Parts of the span; the oldest is forgotten as a whole, so a number counts for a span or an eighth more."""


class RecentLargest:
    """The largest number among those of the last `span` events.

    Events are reports of numbers and additions without any: whichever makes the span pass, an
    outlier is forgotten. Where nothing was reported for a whole span, what was reported last
    counts until the next report.

    Args:
        span: Events to look back on, at least 1.
    """

    def __init__(self, span: int) -> None:
        self._each = -(-span // _PARTS)
        self._parts = [-1.0] * -(-span // self._each)  # the newest last; -1: nothing was reported
        self._events = 0  # in the newest part
        self._current = -1.0
        self._last = -1.0  # of the last part that was forgotten and had a report

    @property
    def value(self) -> float | None:
        """The largest; None before the first report."""
        largest = max(self._current, *self._parts)
        largest = self._last if largest < 0.0 else largest
        return None if largest < 0.0 else largest

    def note(self, events: int, largest: float | None = None) -> None:
        """Count events, with the largest number that they reported."""
        self._events += events
        if self._events >= self._each:
            self._pass(min(self._events // self._each, len(self._parts)))
            self._events %= self._each
        if largest is not None:
            self._current = max(self._current, largest)

    def _pass(self, parts: int) -> None:
        for _ in range(parts):
            dropped, *self._parts = [*self._parts, self._current]
            self._current = -1.0
            self._last = self._last if dropped < 0.0 else dropped

    def state_dict(self) -> dict[str, Any]:
        """Return JSON data."""
        return {"parts": [*self._parts, self._current, self._last], "events": self._events}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        *self._parts, self._current, self._last = map(float, state["parts"])
        self._events = int(state["events"])
