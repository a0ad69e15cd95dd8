"""Ranks of a changing set of numbers, sorted now and then (Schaul et al. 2015, section 3.3)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from learnit_r8.replay.saving import filled
from learnit_r8.types import Indices

Floats = NDArray[np.float64]


class Ranking:
    """Numbers in slots and their ranks, 1 for the largest.

    Sorting is paid for once per `capacity` changes, and whenever the number of slots in use
    has doubled; in between a number's rank is looked up in the last order.

    Args:
        capacity: Number of slots.
    """

    def __init__(self, capacity: int) -> None:
        self.values = np.zeros(capacity)
        self._order = np.zeros(0)
        self._changes = 0

    def set(self, slots: Indices, values: Floats, used: int) -> tuple[Indices, Floats]:
        """Change numbers; return the slots whose ranks changed most, and these ranks.

        Args:
            slots: Which.
            values: Their new numbers.
            used: Slots `0 .. used - 1` are in use.
        """
        self.values[slots] = values
        self._changes += slots.size
        if self._changes >= len(self.values) or used >= 2 * len(self._order):
            return self._sort(used)
        larger = len(self._order) - np.searchsorted(self._order, values, side="right")
        ranks: Floats = 1.0 + larger.astype(np.float64) * (used / len(self._order))
        return slots, ranks

    def state_dict(self, used: int) -> dict[str, Any]:
        """Return copies of everything that the next ranks depend on."""
        return {"values": self.values[:used].copy(), "order": self._order.copy(), "changes": self._changes}

    def load_state_dict(self, state: dict[str, Any], used: int) -> None:
        """Restore what `state_dict` returned."""
        self.values = filled(state["values"], used, np.zeros_like(self.values))
        self._order = np.array(state["order"], dtype=np.float64)
        self._changes = int(state["changes"])

    def _sort(self, used: int) -> tuple[Indices, Floats]:
        descending = np.argsort(-self.values[:used], kind="stable")
        self._order = self.values[descending[::-1]]
        self._changes = 0
        return descending, np.arange(1.0, used + 1.0)
