"""Line charts from characters.

Raw minima and maxima form a band behind the smoothed line: a spike of one point is a column of the band, whatever the
width. A cell is a small raster: 2 x 4 dots of a braille character, 8 levels of a block, or 3 of ASCII. All that is
drawn is a vertical run of dots in each raster column, all columns at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from learnit_r8.dashboard.drawing.cells import Grid
from learnit_r8.dashboard.drawing.glyphs import RASTERS, Raster
from learnit_r8.dashboard.drawing.scales import Scale, choose_scale, x_ticks, y_ticks
from learnit_r8.run import formats as f
from learnit_r8.run.series import HUGE, Bins, Floats
from learnit_r8.run.styles import Style

Ints = npt.NDArray[np.int64]
LABEL_WIDTH = 6
_MARK_ORDER = "R!XCLPV"
"""Where marks fall into one cell the first of these has it; the next goes into the cell before."""
_ROUTINE, _APART = "CVP", 3
_MARK_STYLES = {"!": Style.BAD, "R": Style.WARN, "X": Style.BAD, "C": Style.GOOD, "V": Style.ACCENT}


@dataclass(frozen=True, slots=True)
class Chart:
    """What a line chart shows."""

    bins: Bins  # the series, oldest first
    average: int | None = None  # which moving average to draw as the line; None draws the last values
    axis: str = "step"  # "step", "time" or "epoch"
    origin: float = 0.0  # time at which the time axis starts
    scale: str = "auto"  # "auto", "log" or "linear"
    prefer_log: bool = False  # "auto" may choose a logarithmic axis
    marks: Sequence[tuple[float, float, str]] = ()  # (step, time, icon) of events, drawn on the horizontal axis
    points: Sequence[tuple[float, float, float]] = ()  # (step, time, value) of another series, drawn as dots
    epochs: Sequence[tuple[int, int]] = ()  # (first step, epoch) for the epoch axis
    # Lines of other runs, each with a letter that stands at its end
    others: Sequence[tuple[str, Bins]] = field(default=())


def draw_chart(grid: Grid, y: int, x: int, width: int, height: int, chart: Chart, glyphs: str) -> Scale | None:
    """Draw a chart, axes and labels included, into a rectangle of the grid.

    Returns:
        The vertical axis chosen, or None where there was nothing to draw.
    """
    rows, cells = height - 2, width - LABEL_WIDTH - 1
    points = [point for point in chart.points if abs(point[2]) < HUGE]
    scale = choose_scale(chart.bins, chart.scale, chart.prefer_log, [value for _, _, value in points])
    if rows < 1 or cells < 2 or scale is None:
        if height > 0:
            text = "no finite value yet" if len(chart.bins) else "waiting for the first value"
            grid.put(y + height // 2, x + max(1, (width - len(text)) // 2), text, Style.DIM, x + width)
        return None
    by_time = chart.axis == "time"
    first, last = chart.bins[0], chart.bins[-1]
    low = float(first["first_time"] - chart.origin if by_time else first["first_step"])
    high = float(last["last_time"] - chart.origin if by_time else last["last_step"])
    raster = RASTERS[glyphs]
    per_x = (cells * raster.columns - 1) / (high - low) if high > low else 0.0
    plot = Plot(y, x + LABEL_WIDTH + 1, rows, cells, raster, scale, low, high, per_x, by_time, chart.origin)
    _draw_axes(grid, plot, chart)
    _draw_lines(grid, plot, chart)
    _draw_points(grid, plot, points)
    _draw_outliers(grid, plot, chart.bins)
    return scale


def _draw_axes(grid: Grid, plot: Plot, chart: Chart) -> None:
    left, base = plot.x - 1, plot.y + plot.rows
    labels = dict(y_ticks(plot.scale, plot.rows))
    for row in range(plot.rows):
        label = labels.get(row)
        grid.put(plot.y + row, left, "┤" if label else "│", Style.DIM)
        if label:
            grid.put(plot.y + row, left - LABEL_WIDTH, label.rjust(LABEL_WIDTH), Style.DIM, left)
    grid.put(base, left, "└" + "─" * plot.cells, Style.DIM)
    _draw_x_labels(grid, plot, chart)
    inside, cells = plot.places(chart.marks)
    icons = (icon for _, _, icon in itertools.compress(chart.marks, inside))
    marks = dict.fromkeys(zip(icons, cells, strict=True))
    taken: dict[int, str] = {}
    for icon, cell in sorted(marks, key=lambda mark: (_MARK_ORDER.find(mark[0]), mark[1])):
        place = cell if taken.get(cell, icon) == icon else cell - 1
        # What happens every epoch is marked where it leaves room to see what does not.
        routine = icon in _ROUTINE and any(near in taken for near in range(place - _APART, place + _APART + 1))
        if place >= 0 and place not in taken and not routine:
            taken[place] = icon
            grid.put(base, plot.x + place, icon, _MARK_STYLES.get(icon, Style.MARK))


def _draw_x_labels(grid: Grid, plot: Plot, chart: Chart) -> None:
    base = plot.y + plot.rows
    ticks = [(float(step), str(epoch + 1)) for step, epoch in chart.epochs if plot.low <= step <= plot.high]
    end = ""
    if chart.axis == "epoch" and ticks:
        ticks = ticks[:: max(1, -(-len(ticks) * 6 // max(1, plot.cells)))]
    else:
        ticks = x_ticks(plot.low, plot.high, plot.cells, "time" if plot.by_time else "step")
        end = f.span(plot.high) if plot.by_time else f.count(plot.high)
    free, edge = plot.x, plot.x + plot.cells
    # The end's own label says more than a tick close to it.
    reserved = edge - len(end) - 2 if end else edge
    for cell, (_, label) in zip(plot.cells_of(np.array([at for at, _ in ticks])).tolist(), ticks, strict=True):
        if free <= plot.x + cell <= reserved - len(label):
            grid.put(base, plot.x + cell, "┬", Style.DIM)
            free = grid.put(base + 1, plot.x + cell, label, Style.DIM) + 2
    if end and edge - len(end) >= free - 1:
        grid.put(base + 1, edge - len(end), end, Style.DIM)


def _draw_lines(grid: Grid, plot: Plot, chart: Chart) -> None:
    """Draw the band, other runs' lines, and the line on top of all."""
    lows, highs, ends = columns_of(plot, chart.bins, chart.average)
    solid = "" if plot.raster.columns > 1 else ":" if grid.ascii_only else "░"
    layers = [(band(plot, lows, highs), Style.DIM, solid)]
    letters = []
    for letter, bins in chart.others:
        dots, end = line(plot, columns_of(plot, bins, chart.average)[2])
        layers.append((dots, Style.MARK, ""))
        if end is not None:
            letters.append((end, letter))
    layers.append((line(plot, ends)[0], Style.ACCENT, ""))
    chars = np.full((plot.rows, plot.cells), " ")
    styles = np.zeros((plot.rows, plot.cells), np.int64)
    for dots, style, glyph in layers:
        some = dots > 0
        chars[some] = glyph or plot.raster.glyphs[dots[some]]
        styles[some] = style
    for row in range(plot.rows):
        grid.put_row(plot.y + row, plot.x, chars[row].tolist(), styles[row].tolist())
    for (column, row), letter in letters:
        cell = min(plot.cells - 1, column // plot.raster.columns + 1)
        grid.put(plot.y + row // plot.raster.rows, plot.x + cell, letter, Style.MARK)


def _draw_points(grid: Grid, plot: Plot, points: Sequence[tuple[float, float, float]]) -> None:
    rows = plot.dots(np.array([value for _, _, value in points])) // plot.raster.rows
    inside, cells = plot.places(points, after=True)
    for row, cell in set(zip(rows[inside].tolist(), cells, strict=True)):
        grid.put(plot.y + int(row), plot.x + cell, "●", Style.MARK)


def _draw_outliers(grid: Grid, plot: Plot, bins: Bins) -> None:
    """Mark what the vertical range leaves out: ▲value above, ▼value below, × for not finite."""
    above: dict[int, float] = {}
    below: dict[int, float] = {}
    low, high = plot.scale.low, plot.scale.high
    bins = bins[(bins["hi"] > high) | (bins["lo"] < low) | (bins["bad"] > 0)]
    cells = plot.cells_of(plot.positions(bins["first_step"], bins["first_time"]))
    bad = set(cells[bins["bad"] > 0].tolist())
    for cell, lo, hi in zip(cells.tolist(), bins["lo"].tolist(), bins["hi"].tolist(), strict=True):
        if lo <= hi and hi > high:
            above[cell] = max(hi, above.get(cell, hi))
        if lo <= hi and lo < low:
            below[cell] = min(lo, below.get(cell, lo))
    _label_outliers(grid, plot, plot.y, "▲", above, bad)
    _label_outliers(grid, plot, plot.y + plot.rows - 1, "▼", below, set())
    for cell in bad:
        grid.put(plot.y, plot.x + cell, "×", Style.BAD)


def _label_outliers(grid: Grid, plot: Plot, y: int, arrow: str, values: dict[int, float], taken: set[int]) -> None:
    """Draw every arrow, and the values of the most extreme ones where there is room."""
    used = set(values) | taken
    for cell in values:
        grid.put(y, plot.x + cell, arrow, Style.WARN)
    for cell, value in sorted(values.items(), key=lambda pair: -abs(pair[1])):
        text = f.short(value)
        for start in (cell + 1, cell - len(text)):
            place = set(range(start - 1, start + len(text) + 1)) - {cell}
            inside = start >= 0 and start + len(text) <= plot.cells
            if inside and not place & used:
                grid.put(y, plot.x + start, text, Style.WARN)
                used |= place
                break


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
    high: float
    per_x: float
    by_time: bool
    origin: float

    @property
    def columns(self) -> int:
        return self.cells * self.raster.columns

    def positions(self, steps: Floats, times: Floats) -> Floats:
        return times - self.origin if self.by_time else steps

    def cells_of(self, positions: Floats) -> Ints:
        columns = ((positions - self.low) * self.per_x).clip(0, self.columns - 1).astype(np.int64)
        found: Ints = columns // self.raster.columns
        return found

    def places(self, points: Sequence[tuple[float, float, Any]], after: bool = False) -> tuple[list[int], list[int]]:
        """Return which points lie on the horizontal axis, or `after` its end too, and the cells of those."""
        positions = self.positions(*np.array([point[:2] for point in points]).reshape(-1, 2).T)
        inside = (positions >= self.low) & (after | (positions <= self.high))
        return inside.tolist(), self.cells_of(positions[inside]).tolist()

    def dots(self, values: Floats) -> Floats:
        return self.scale.rows(values, self.rows * self.raster.rows)


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
