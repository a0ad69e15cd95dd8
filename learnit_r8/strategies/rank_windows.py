"""Numbers of given ranks, exact at any time, from a window around each of them."""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_LEAST_REACH = 64
_REACH = 128
"""A window reaches over a 128th of the numbers to either side of its rank: sorting all anew is
rare, and few changes fall into a window."""
_GROWTH = 8
"""Times its reach a window may hold, so that a shift within it stays short."""


class RankWindows:
    """Many floats, of which a few change between questions for the numbers of certain ranks.

    Edges cut the line into cells: below the first edge, at it, between it and the second, and so on.
    Of every cell the count is known, and of the cells near a rank the numbers themselves, in order.

    Args:
        values: Finite floats, in any order.
        ranks: What is going to be asked for (0: the lowest number), or ranks near these.
        mark: A number of which it is to be known how many are lower.
    """

    def __init__(self, values: NDArray[np.float64], ranks: Sequence[int], mark: float) -> None:
        self._ranks, self._mark = ranks, mark
        self._sorted: NDArray[np.float64] | None = np.sort(values)  # until the first change

    def _cut(self, ordered: NDArray[np.float64]) -> None:
        self._sorted = None
        count = len(ordered)
        reach = max(_LEAST_REACH, count // _REACH)
        self._most = _GROWTH * reach
        # Where there is no such rank there is no edge: the window is open.
        lows = [float(ordered[rank - reach]) if rank >= reach else -np.inf for rank in self._ranks]
        highs = [float(ordered[rank + reach]) if rank + reach < count else np.inf for rank in self._ranks]
        edges = np.unique([*lows, *highs, self._mark])
        edges = edges[np.isfinite(edges)]
        # A cell has the numbers from its lower bound to less than the next one: an edge's own cell the edge only.
        self._bounds = np.stack([edges, np.nextafter(edges, np.inf)], axis=1).reshape(-1)
        starts = [0, *ordered.searchsorted(self._bounds).tolist(), count]
        self._counts = np.diff(starts)
        near = zip(self._cells(lows).tolist(), self._cells(highs).tolist(), strict=True)
        self._windows = {
            cell: array("d", ordered[starts[cell] : starts[cell + 1]].tobytes())
            for cell in {cell for low, high in near for cell in range(low, high + 1) if cell % 2 == 0}
        }
        self._has_window = np.zeros(len(self._counts), bool)
        self._has_window[list(self._windows)] = True

    def _cells(self, values: Sequence[float] | NDArray[np.float64]) -> NDArray[np.int64]:
        return self._bounds.searchsorted(values, side="right")

    def replace(self, old: Sequence[float], new: Sequence[float]) -> None:
        """Put in the new numbers and then take out the old ones, each of which must be there by then."""
        if self._sorted is not None:
            self._cut(self._sorted)
        values = np.concatenate([new, old])
        cells = self._cells(values)
        size = len(self._counts)
        self._counts += np.bincount(cells[: len(new)], minlength=size)
        self._counts -= np.bincount(cells[len(new) :], minlength=size)
        near = self._has_window[cells].nonzero()[0]
        for place, cell, value in zip(near.tolist(), cells[near].tolist(), values[near].tolist(), strict=True):
            window = self._windows[cell]
            if place < len(new):
                insort(window, value)
            else:
                del window[bisect_left(window, value)]

    def at_first(self) -> tuple[list[float], int]:
        """Return the numbers of the ranks, and how many are below the mark, before any change."""
        assert self._sorted is not None
        return self._sorted[list(self._ranks)].tolist(), int(self._sorted.searchsorted(self._mark))

    def answer(self, ranks: Sequence[int], mark: float) -> tuple[list[float], int] | None:
        """Return the same for these ranks and this mark, after changes.

        Returns:
            None where the mark is another one, a rank has left the windows or these have become too large.
        """
        if mark != self._mark or any(len(window) > self._most for window in self._windows.values()):
            return None
        ends = self._counts.cumsum()
        found = []
        for rank, cell in zip(ranks, ends.searchsorted(ranks, side="right").tolist(), strict=True):
            if cell % 2:
                found.append(float(self._bounds[cell - 1]))
            elif cell in self._windows:
                found.append(self._windows[cell][rank - int(ends[cell])])  # counted from the cell's end
            else:
                return None
        below = int(self._counts[: int(self._bounds.searchsorted(mark)) + 1].sum())
        return found, below
