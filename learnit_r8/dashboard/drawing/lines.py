"""A chart's band and lines as dots, all raster columns at once.

A chart's cell is a small raster: 2 x 4 dots of a braille character, 8 levels of a block, or 3 of ASCII. Everything
that is drawn is a vertical run of dots in each raster column.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from learnit_r8.dashboard.drawing.glyphs import Raster
from learnit_r8.dashboard.drawing.scales import Scale
from learnit_r8.run.series import Bins, Floats

Ints = npt.NDArray[np.int64]


@dataclass(slots=True)
class Plot:
    """The place of a chart's lines on the grid, and its two axes."""

    y: int
    x: int
    rows: int
    cells: int
    raster: Raster
    scale: Scale
    low: float
    per_x: float
    by_time: bool
    origin: float

    @property
    def columns(self) -> int:
        """Raster columns."""
        return self.cells * self.raster.columns

    def column(self, position: float) -> int:
        """Return the raster column of a horizontal position."""
        return min(self.columns - 1, max(0, int((position - self.low) * self.per_x)))

    def cells_of(self, positions: Floats) -> Ints:
        """Return the cell of every horizontal position."""
        columns = ((positions - self.low) * self.per_x).clip(0, self.columns - 1).astype(np.int64)
        found: Ints = columns // self.raster.columns
        return found

    def dots(self, values: Floats) -> Floats:
        """Return the raster row of every value."""
        return self.scale.rows(values, self.rows * self.raster.rows)

    def position(self, step: float, time: float) -> float:
        """Return the horizontal position of a point."""
        return time - self.origin if self.by_time else step


def columns_of(plot: Plot, bins: Bins, average: int | None) -> tuple[Floats, Floats, Floats]:
    """Spread the bins over the raster columns that they cover.

    Returns:
        Lowest and highest value of each column (inf and -inf where there is none), and the value of
        the line at its end: NaN where no bin ends, infinite where the line breaks.
    """
    lows, highs = np.full(plot.columns, math.inf), np.full(plot.columns, -math.inf)
    ends = np.full(plot.columns, math.nan)
    low = plot.low + (plot.origin if plot.by_time else 0.0)
    kind = "time" if plot.by_time else "step"
    first, column = (
        ((bins[f"{edge}_{kind}"] - low) * plot.per_x).clip(0, plot.columns - 1).astype(np.int64)
        for edge in ("first", "last")
    )
    finite = bins["lo"] <= bins["hi"]
    if not finite.all():
        ends[column] = math.inf
        bins, first, column = bins[finite], first[finite], column[finite]
    ends[column] = bins["last"] if average is None else bins["averages"][:, average]
    wide = np.maximum(column - first, 0) + 1
    many = np.repeat(np.arange(len(bins)), wide)
    covered = column[many] - (np.cumsum(wide) - 1)[many] + np.arange(len(many))
    np.minimum.at(lows, covered, bins["lo"][many])
    np.maximum.at(highs, covered, bins["hi"][many])
    return lows, highs, ends


def band(plot: Plot, lows: Floats, highs: Floats) -> Ints:
    """Return the dots of a band: a texture that a line stands out from, with both edges whole."""
    some = lows <= highs
    top, bottom = plot.dots(np.where(some, highs, math.nan)), plot.dots(np.where(some, lows, math.nan))
    rows = np.arange(plot.rows * plot.raster.rows)[:, None]
    dots = (rows > top) & (rows < bottom) & np.tile(plot.raster.texture, (plot.rows, plot.cells))
    return _cells(plot, dots | (rows == top) | (rows == bottom))


def line(plot: Plot, ends: Floats) -> tuple[Ints, tuple[int, int] | None]:
    """Return the dots of a connected line through the columns' values, which infinite ones interrupt.

    Returns:
        The dots, and raster column and row of the line's end: None where there is no line.
    """
    breaks = np.isinf(ends)
    known = np.flatnonzero(np.isfinite(ends))
    if not len(known):
        return np.zeros((plot.rows, plot.cells), np.int64), None
    values = plot.dots(ends[known])
    columns = np.arange(plot.columns)
    after = np.searchsorted(known, columns).clip(1, max(1, len(known) - 1))
    x0, y0 = known[after - 1], values[after - 1]
    x1, y1 = known[after % len(known)], values[after % len(known)]
    rows = y0 + np.rint((y1 - y0) * (columns - x0) / np.maximum(1, x1 - x0))
    # Where a break lies between two values, only they are drawn.
    parts = np.cumsum(breaks)
    rows[(parts[x0] != parts[x1]) | (columns < known[0]) | (columns > known[-1])] = math.nan
    rows[known] = values
    before = np.concatenate([rows[:1], rows[:-1]])
    joined = np.isfinite(before) & (parts == np.concatenate([parts[:1], parts[:-1]]))
    before = np.where(joined, before, rows)
    top = np.where(rows > before, before + 1, rows)
    bottom = np.where(rows < before, before - 1, rows)
    dots = np.arange(plot.rows * plot.raster.rows)[:, None]
    return _cells(plot, (dots >= top) & (dots <= bottom)), (int(known[-1]), int(values[-1]))


def _cells(plot: Plot, dots: npt.NDArray[np.bool_]) -> Ints:
    """Return the bits of every cell, int of shape (rows, cells)."""
    raster = plot.raster
    found: Ints = np.einsum(
        "ricj,ij->rc", dots.reshape(plot.rows, raster.rows, plot.cells, raster.columns), raster.bits
    )
    return found
