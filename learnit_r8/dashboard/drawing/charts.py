"""Line charts from characters.

Raw minima and maxima form a band behind the smoothed line: a spike of one point is a column of the
band, whatever the width. `lines.py` turns both into characters.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from learnit_r8.dashboard.drawing.cells import Grid
from learnit_r8.dashboard.drawing.glyphs import RASTERS
from learnit_r8.dashboard.drawing.lines import Plot, band, columns_of, line
from learnit_r8.dashboard.drawing.scales import Scale, choose_scale, x_ticks, y_ticks
from learnit_r8.run import formats as f
from learnit_r8.run.series import HUGE, Bins
from learnit_r8.run.styles import Style

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
    plot = Plot(y, x + LABEL_WIDTH + 1, rows, cells, raster, scale, low, per_x, by_time, chart.origin)
    _draw_axes(grid, plot, chart, high)
    _draw_lines(grid, plot, chart)
    _draw_points(grid, plot, points)
    _draw_outliers(grid, plot, chart.bins)
    return scale


def _draw_axes(grid: Grid, plot: Plot, chart: Chart, high: float) -> None:
    left, base = plot.x - 1, plot.y + plot.rows
    labels = dict(y_ticks(plot.scale, plot.rows))
    for row in range(plot.rows):
        label = labels.get(row)
        grid.put(plot.y + row, left, "┤" if label else "│", Style.DIM)
        if label:
            grid.put(plot.y + row, left - LABEL_WIDTH, label.rjust(LABEL_WIDTH), Style.DIM, left)
    grid.put(base, left, "└" + "─" * plot.cells, Style.DIM)
    _draw_x_labels(grid, plot, chart, high)
    positions = np.array([plot.position(step, time) for step, time, _ in chart.marks])
    inside = (plot.low <= positions) & (positions <= high)
    icons = (icon for _, _, icon in itertools.compress(chart.marks, inside.tolist()))
    marks = dict.fromkeys(zip(icons, plot.cells_of(positions[inside]).tolist(), strict=True))
    taken: dict[int, str] = {}
    for icon, cell in sorted(marks, key=lambda mark: (_MARK_ORDER.find(mark[0]), mark[1])):
        place = cell if taken.get(cell, icon) == icon else cell - 1
        # What happens every epoch is marked where it leaves room to see what does not.
        routine = icon in _ROUTINE and any(near in taken for near in range(place - _APART, place + _APART + 1))
        if place >= 0 and place not in taken and not routine:
            taken[place] = icon
            grid.put(base, plot.x + place, icon, _MARK_STYLES.get(icon, Style.MARK))


def _draw_x_labels(grid: Grid, plot: Plot, chart: Chart, high: float) -> None:
    base = plot.y + plot.rows
    inside = [(float(step), str(epoch + 1)) for step, epoch in chart.epochs if plot.low <= step <= high]
    if chart.axis == "epoch" and inside:
        ticks = inside[:: max(1, -(-len(inside) * 6 // max(1, plot.cells)))]
        end = ""
    else:
        kind = "time" if plot.by_time else "step"
        ticks = x_ticks(plot.low, high, plot.cells, kind)
        end = f.span(high) if plot.by_time else f.count(high)
    edge = plot.x + plot.cells
    reserved = edge - len(end) - 2 if end else edge
    free = plot.x
    for position, label in ticks:
        cell = plot.x + plot.column(position) // plot.raster.columns
        if cell < free or cell + len(label) > edge:
            continue
        if cell + len(label) > reserved:
            # The end's own label says more than a tick close to it.
            continue
        grid.put(base, cell, "┬", Style.DIM)
        free = grid.put(base + 1, cell, label, Style.DIM) + 2
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
    positions = np.array([plot.position(step, time) for step, time, _ in points])
    inside = positions >= plot.low
    for row, cell in set(zip(rows[inside].tolist(), plot.cells_of(positions[inside]).tolist(), strict=True)):
        grid.put(plot.y + int(row), plot.x + cell, "●", Style.MARK)


def _draw_outliers(grid: Grid, plot: Plot, bins: Bins) -> None:
    """Mark what the vertical range leaves out: ▲value above, ▼value below, × for not finite."""
    above: dict[int, float] = {}
    below: dict[int, float] = {}
    bad: set[int] = set()
    low, high = plot.scale.low, plot.scale.high
    outside = bins[(bins["hi"] > high) | (bins["lo"] < low) | (bins["bad"] > 0)]
    for step, time, lo, hi, faults in zip(
        *(outside[name].tolist() for name in ("first_step", "first_time", "lo", "hi", "bad")), strict=True
    ):
        cell = plot.column(plot.position(step, time)) // plot.raster.columns
        if faults:
            bad.add(cell)
        if lo > hi:
            continue
        if hi > high:
            above[cell] = max(hi, above.get(cell, hi))
        if lo < low:
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
