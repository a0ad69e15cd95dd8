"""Numbers of given ranks, exact at any time, from a window around each of them."""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_REACH = 128
"""A window reaches over a 128th of the numbers to either side of its rank: sorting all anew is
rare, and few changes fall into a window."""
_CELLS = 8
"""Cells to either side of the rank: a shift within one is short."""
_LEAST = 16  # numbers in a cell
_GROWTH = 8
"""Times as many numbers a cell may hold before all are sorted anew."""


class RankWindows:
    """Many floats, of which a few change between questions for the numbers of certain ranks.

    Edges cut the line into cells: below the first edge, at it, between it and the second, and so on.
    Of every cell the count is known, and of the cells around a rank (0: the lowest number's) the numbers themselves,
    in order. Of the `mark` it is known how many are lower.
    """

    def __init__(self, ordered: NDArray[np.float64], ranks: Sequence[int], mark: float) -> None:
        self._mark, count = mark, len(ordered)
        load = max(_LEAST, count // (_REACH * _CELLS))
        self._most = _GROWTH * load
        places = np.add.outer(np.array(ranks, np.int64), load * np.arange(-_CELLS, _CELLS + 1))
        edges = np.unique([*ordered[places[(places >= 0) & (places < count)]], mark])
        # Where there is no such place the window is open.
        lows = np.where(places[:, 0] >= 0, ordered.take(places[:, 0], mode="clip"), -np.inf)
        highs = np.where(places[:, -1] < count, ordered.take(places[:, -1], mode="clip"), np.inf)
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
        self._mark_cell = int(self._cells(np.array([mark]))[0])
        self._crowded = False

    def _cells(self, values: NDArray[np.float64]) -> NDArray[np.int64]:
        return self._bounds.searchsorted(values, side="right")

    def replace(self, old: array[float], new: array[float]) -> None:
        """Put in the new numbers and then take out the old ones, each of which must be there by then."""
        values = np.frombuffer(new + old)
        cells = self._cells(values)
        size = len(self._counts)
        self._counts += np.bincount(cells[: len(new)], minlength=size)
        self._counts -= np.bincount(cells[len(new) :], minlength=size)
        near = self._has_window[cells].nonzero()[0]
        for place, cell, value in zip(near.tolist(), cells[near].tolist(), values[near].tolist(), strict=True):
            window = self._windows[cell]
            if place < len(new):
                insort(window, value)
                self._crowded |= len(window) > self._most
            else:
                del window[bisect_left(window, value)]

    def answer(self, ranks: Sequence[int], mark: float) -> tuple[list[float], int] | None:
        """Return the numbers of the ranks, and how many are below the mark.

        None where a rank has left the windows, the mark is another one or too many numbers have come: sort anew.
        """
        if mark != self._mark or self._crowded:
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
        return found, int(ends[self._mark_cell - 1])
