"""A multiset of floats kept in order, for quantiles that are exact at any time."""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

_LOAD = 512
"""Numbers in a block when it is made; it splits at twice as many. A block is 4 to 8 KiB, so a
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
        self._highest = [block[-1] for block in self._blocks]
        self._count = len(ordered)

    def __len__(self) -> int:
        return self._count

    def add(self, value: float) -> None:
        """Put a number in."""
        self._count += 1
        if not self._blocks:
            self._blocks, self._highest = [array("d", [value])], [value]
            return
        at = min(bisect_left(self._highest, value), len(self._blocks) - 1)
        block = self._blocks[at]
        insort(block, value)
        if len(block) > 2 * _LOAD:
            self._blocks[at : at + 1] = [block[:_LOAD], block[_LOAD:]]
            self._highest[at : at + 1] = [block[_LOAD - 1], block[-1]]
        else:
            self._highest[at] = block[-1]

    def remove(self, value: float) -> None:
        """Take out one number that was put in."""
        at = bisect_left(self._highest, value)
        block = self._blocks[at]
        del block[bisect_left(block, value)]
        self._count -= 1
        if block:
            self._highest[at] = block[-1]
        else:
            del self._blocks[at], self._highest[at]

    def select(self, ranks: Sequence[int]) -> list[float]:
        """Return the numbers of these ranks (0: the lowest); the ranks are in rising order."""
        found = []
        at, before = 0, 0
        for rank in ranks:
            while rank - before >= len(self._blocks[at]):
                before += len(self._blocks[at])
                at += 1
            found.append(self._blocks[at][rank - before])
        return found

    def count_below(self, value: float) -> int:
        """Return how many numbers are lower than `value`."""
        at = bisect_left(self._highest, value)
        below = sum(len(block) for block in self._blocks[:at])
        return below + (bisect_left(self._blocks[at], value) if at < len(self._blocks) else 0)
