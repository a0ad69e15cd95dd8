"""The largest of the numbers reported lately, and so what a new experience may weigh."""

from __future__ import annotations

from learnit_r8.core.state import Saved, each, table

_PARTS = 8
"""Parts of the span; the oldest is forgotten as a whole, so a number counts for a span or an eighth more."""


class RecentLargest(Saved):
    """The largest number among those of the last `span` events.

    Events are reports of numbers and additions without any: whichever makes the span pass, an
    outlier is forgotten. Where nothing was reported for a whole span, what was reported last
    counts until the next report.
    """

    _saved = table(parts=each(float), events=int)

    def __init__(self, span: int) -> None:
        self._each = -(-span // _PARTS)
        # The parts' largest numbers, the one that is going on last, and that of the last part that was forgotten
        # and had a report; -1: nothing was reported.
        self._parts = [-1.0] * (-(-span // self._each) + 2)
        self._events = 0  # in the part that is going on

    @property
    def value(self) -> float | None:
        """The largest; None before the first report."""
        largest = max(self._parts[:-1])
        largest = self._parts[-1] if largest < 0.0 else largest
        return None if largest < 0.0 else largest

    def note(self, events: int, largest: float | None = None) -> None:
        """Count events, with the largest number that they reported."""
        self._events += events
        if self._events >= self._each:
            self._pass(min(self._events // self._each, len(self._parts) - 2))
            self._events %= self._each
        if largest is not None:
            self._parts[-2] = max(self._parts[-2], largest)

    def _pass(self, parts: int) -> None:
        for _ in range(parts):
            dropped, *kept, last = self._parts
            self._parts = [*kept, -1.0, last if dropped < 0.0 else dropped]
