"""The k highest of many changing numbers, without a pass over all of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from learnit_r8.types import Indices, Losses

_SHIFT = 4
_FAN_OUT = 1 << _SHIFT
_LAST_LEVEL = 4096
"""The top level is searched as a whole; up to this size that costs less than another level."""


class MaxTree:
    """Numbers in slots; each inner node holds the highest of its 16 children.

    The k highest slots lie below the k highest nodes of every level, so `top(k)` follows
    k nodes downwards: O(k log N). All slots start at minus infinity, which means empty.

    Args:
        size: Number of slots.
    """

    def __init__(self, size: int) -> None:
        self._levels: list[Losses] = []
        while True:
            nodes = (size + _FAN_OUT - 1) >> _SHIFT
            last = size <= _LAST_LEVEL
            self._levels.append(np.full(size if last else nodes << _SHIFT, -np.inf, np.float32))
            if last:
                break
            size = nodes

    def set(self, slots: Indices, values: Losses | float) -> None:
        """Give slots new numbers."""
        self._levels[0][slots] = values
        for level in range(1, len(self._levels)):
            slots = slots >> _SHIFT
            children = self._levels[level - 1].reshape(-1, _FAN_OUT)
            self._levels[level][slots] = children.take(slots, axis=0).max(axis=1)

    def fill(self, values: Losses) -> None:
        """Give all slots new numbers; O(N)."""
        self._levels[0][: len(values)] = values
        for level in range(1, len(self._levels)):
            children = self._levels[level - 1].reshape(-1, _FAN_OUT).max(axis=1)
            self._levels[level][: len(children)] = children

    def top(self, k: int) -> Indices:
        """Return the slots of the k highest numbers, the highest first; fewer where fewer are set."""
        if k <= 0:
            return np.empty(0, np.int64)
        values = self._levels[-1]
        nodes = np.arange(len(values))
        for level in range(len(self._levels) - 1, -1, -1):
            nodes, values = _highest(nodes, values, k)
            if level:
                nodes = ((nodes << _SHIFT)[:, None] + np.arange(_FAN_OUT)).ravel()
                values = self._levels[level - 1].take(nodes)
        order: NDArray[np.intp] = np.lexsort((nodes, -values))
        return nodes[order].astype(np.int64, copy=False)


def _highest(nodes: Indices, values: Losses, k: int) -> tuple[Indices, Losses]:
    if len(values) > k:
        chosen = np.argpartition(values, len(values) - k)[-k:]
        nodes, values = nodes[chosen], values[chosen]
    there = values > -np.inf
    return (nodes, values) if there.all() else (nodes[there], values[there])
