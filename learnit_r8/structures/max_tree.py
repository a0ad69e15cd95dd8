"""The k highest of many changing numbers, without a pass over all of them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from learnit_r8.types import Indices, Losses

_SHIFT = 4
_FAN_OUT = 1 << _SHIFT
_LAST_LEVEL = 4096
"""The top level is searched as a whole; up to this size that costs less than another level."""


class MaxTree:
    """Numbers in slots; each inner node holds the highest of its 16 children.

    The k highest slots lie below the k highest nodes of every level, so `top(k)` follows
    k nodes downwards: O(k log N). All slots start at minus infinity, which means empty.
    """

    def __init__(self, size: int) -> None:
        self._levels: list[Losses] = []
        self._filled = False  # some slot may have a number
        while True:
            nodes = (size + _FAN_OUT - 1) >> _SHIFT
            last = size <= _LAST_LEVEL
            self._levels.append(np.full(size if last else nodes << _SHIFT, -np.inf, np.float32))
            if last:
                break
            size = nodes

    def insert(self, slots: Indices, values: Losses) -> None:
        """Give empty slots numbers."""
        self._filled = True
        self._levels[0][slots] = values
        for level in self._levels[1:]:
            slots = slots >> _SHIFT
            np.maximum.at(level, slots, values)

    def remove(self, slots: Indices) -> None:
        """Empty slots."""
        self._levels[0][slots] = -np.inf
        for children, level in pairwise(self._levels):
            slots = slots >> _SHIFT
            rows = children.reshape(-1, _FAN_OUT).take(slots, axis=0)
            level[slots] = np.ascontiguousarray(rows.T).max(axis=0)  # five times as fast as max(axis=1)

    def fill(self, values: Losses) -> None:
        """Give all slots new numbers; O(N)."""
        self._filled = True
        self._levels[0][: len(values)] = values
        for children, level in pairwise(self._levels):
            highest = children.reshape(-1, _FAN_OUT).max(axis=1)
            level[: len(highest)] = highest

    def top(self, k: int) -> Indices:
        """Return the slots of the k highest numbers, the highest first; fewer where fewer are set."""
        self._filled = self._filled and bool(np.maximum.reduce(self._levels[-1]) > -np.inf)
        if k <= 0 or not self._filled:
            return np.empty(0, np.int64)
        nodes, lowest = _highest(self._levels[-1], k)
        for level in self._levels[-2::-1]:
            # k numbers are known to be at least `lowest`: nothing below it can be among the k highest.
            rows = level.reshape(-1, _FAN_OUT).take(nodes, axis=0)
            high = np.flatnonzero(rows >= lowest)
            nodes = (nodes.take(high >> _SHIFT) << _SHIFT) + (high & (_FAN_OUT - 1))
            values = rows.ravel().take(high)
            chosen, lowest = _highest(values, k)
            if len(chosen) < len(nodes):
                nodes = nodes.take(chosen)
        found = self._levels[0].take(nodes)
        return nodes.take(np.argsort(-found, kind="stable"))


def _highest(values: Losses, k: int) -> tuple[Indices, np.float32]:
    """Return the positions of the k highest numbers, ascending, empty ones left out, and the lowest of them."""
    chosen = np.flatnonzero(values > -np.inf)
    if len(chosen) <= k:
        return chosen, np.finfo(np.float32).min
    # Only numbers that are set: among thousands of equal ones a partition takes twenty times as long.
    values = values.take(chosen)
    lowest = np.partition(values, len(values) - k)[-k]
    ties = np.flatnonzero(values == lowest)
    kept = values >= lowest
    kept[ties[k - int(np.count_nonzero(kept)) + len(ties) :]] = False
    return chosen[kept], lowest
