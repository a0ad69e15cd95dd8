"""Ranks of a changing set of numbers, sorted now and then (Schaul et al. 2015, section 3.3)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from learnit_r8.core.state import Saved, table
from learnit_r8.replay.saving import slots
from learnit_r8.types import Indices

Floats = NDArray[np.float64]


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
