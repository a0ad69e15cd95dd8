"""A multiset of floats kept in order, for quantiles that are exact at any time."""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

_LOAD = 256
"""Numbers in a block when it is made; it splits at twice as many. A block is 2 to 4 KiB, so a
shift within it costs less than the interpreter's overhead for the call."""


class SortedFloats:
    """Sorted blocks of floats: adding and removing is a search for the block and a short shift.

    Args:
        values: Finite floats, in any order.
    """

    def __init__(self, values: Iterable[float] = ()) -> None:
        ordered = sorted(values)
        starts = range(0, len(ordered), _LOAD)
        self._blocks = [array("d", ordered[start : start + _LOAD]) for start in starts]
        # Of each block, side by side: a search or a sum over all blocks reads few cache lines.
        self._highest = array("d", [block[-1] for block in self._blocks])
        self._counts = array("q", map(len, self._blocks))
        self._count = len(ordered)

    def __len__(self) -> int:
        return self._count

    def add(self, value: float) -> None:
        """Put a number in."""
        self._count += 1
        if not self._blocks:
            self._blocks, self._highest, self._counts = [array("d", [value])], array("d", [value]), array("q", [1])
            return
        at = min(bisect_left(self._highest, value), len(self._blocks) - 1)
        block = self._blocks[at]
        insort(block, value)
        if len(block) > 2 * _LOAD:
            halves = [block[:_LOAD], block[_LOAD:]]
            self._blocks[at : at + 1] = halves
            self._highest[at : at + 1] = array("d", [half[-1] for half in halves])
            self._counts[at : at + 1] = array("q", map(len, halves))
        else:
            self._highest[at] = block[-1]
            self._counts[at] += 1

    def remove(self, value: float) -> None:
        """Take out one number that was put in."""
        at = bisect_left(self._highest, value)
        block = self._blocks[at]
        del block[bisect_left(block, value)]
        self._count -= 1
        if block:
            self._highest[at] = block[-1]
            self._counts[at] -= 1
        else:
            del self._blocks[at], self._highest[at], self._counts[at]

    def select(self, ranks: Sequence[int]) -> list[float]:
        """Return the numbers of these ranks (0: the lowest)."""
        ends = self._ends()
        blocks = ends.searchsorted(ranks, side="right").tolist()
        return [self._blocks[at][rank - int(ends[at])] for at, rank in zip(blocks, ranks, strict=True)]

    def count_below(self, value: float) -> int:
        """Return how many numbers are lower than `value`."""
        at = bisect_left(self._highest, value)
        below = int(self._ends()[at - 1]) if at else 0
        return below + (bisect_left(self._blocks[at], value) if at < len(self._blocks) else 0)

    def _ends(self) -> NDArray[np.int64]:
        """Return the number of floats up to the end of each block."""
        return np.add.accumulate(np.frombuffer(self._counts, np.int64))
