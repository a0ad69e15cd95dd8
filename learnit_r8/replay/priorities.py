"""What priorities are made of: ranks (Schaul et al. 2015, section 3.3), and the largest number reported lately."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from learnit_r8.core.state import Saved, each, table
from learnit_r8.replay.saving import slots
from learnit_r8.types import Indices

Floats = NDArray[np.float64]

_PARTS = 8
"""Parts of the span; the oldest is forgotten as a whole, so a number counts for a span or an eighth more."""


class Ranking(Saved):
    """Numbers in slots and their ranks, 1 for the largest.

    Sorting is paid for once per `capacity` changes, and whenever the number of slots in use
    has doubled; in between a number's rank is looked up in the last order.
    """

    _saved = table(values=slots(np.float64), order=np.float64, changes=int)

    def __init__(self, capacity: int, used: int = 0) -> None:
        self.capacity, self._used = capacity, used
        self.values = np.zeros(capacity)
        self._order = np.zeros(0)
        self._changes = 0

    def __len__(self) -> int:
        return self._used

    def set(self, slots: Indices, values: Floats, used: int) -> tuple[Indices, Floats]:
        """Change numbers, the first `used` slots being in use; return the slots whose ranks changed most, and these."""
        self._used = used
        self.values[slots] = values
        self._changes += slots.size
        if self._changes >= len(self.values) or used >= 2 * len(self._order):
            return self._sort(used)
        larger = len(self._order) - np.searchsorted(self._order, values, side="right")
        return slots, np.asarray(1.0 + larger.astype(np.float64) * (used / len(self._order)))

    def _sort(self, used: int) -> tuple[Indices, Floats]:
        descending = np.argsort(-self.values[:used], kind="stable")
        self._order = self.values[descending[::-1]]
        self._changes = 0
        return descending, np.arange(1.0, used + 1.0)


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
            for _ in range(min(self._events // self._each, len(self._parts) - 2)):
                dropped, *kept, last = self._parts
                self._parts = [*kept, -1.0, last if dropped < 0.0 else dropped]
            self._events %= self._each
        if largest is not None:
            self._parts[-2] = max(self._parts[-2], largest)
