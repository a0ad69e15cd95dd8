"""Line charts from characters.

A chart's cell is a small raster: 2 x 4 dots of a braille character, 8 levels of a block, or 3 of
ASCII. Everything that is drawn is a vertical run of dots in one raster column, so a column's cost
is the number of cells that it crosses. Raw minima and maxima form a band behind the smoothed
line: a spike of one point is a column of the band, whatever the width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from learnit_r8.dashboard import formats as f
from learnit_r8.dashboard.cells import Grid, Style
from learnit_r8.dashboard.glyphs import RASTERS, Raster
from learnit_r8.dashboard.scales import Scale, choose_scale, x_ticks, y_ticks
from learnit_r8.dashboard.series import HUGE, Bin

LABEL_WIDTH = 6
_MARK_ORDER = "R!XCLPV"
"""Where marks fall into one cell the first of these has it; the next goes into the cell before."""
_MARK_STYLES = {"!": Style.BAD, "R": Style.WARN, "X": Style.BAD, "C": Style.GOOD, "V": Style.ACCENT}


@dataclass(frozen=True, slots=True)
class Chart:
    """What a line chart shows.

    Attributes:
        bins: The series, oldest first.
        average: Which moving average to draw as the line; None draws the last values.
        axis: "step", "time" or "epoch".
        origin: Time at which the time axis starts.
        scale: "auto", "log" or "linear".
        prefer_log: "auto" may choose a logarithmic axis.
        marks: (step, time, icon) of events, drawn on the horizontal axis.
        points: (step, time, value) of another series, drawn as dots.
        epochs: (first step, epoch) for the epoch axis.
        others: Lines of other runs, each with a letter that stands at its end.
    """

    bins: Sequence[Bin]
    average: int | None = None
    axis: str = "step"
    origin: float = 0.0
    scale: str = "auto"
    prefer_log: bool = False
    marks: Sequence[tuple[float, float, str]] = ()
    points: Sequence[tuple[float, float, float]] = ()
    epochs: Sequence[tuple[int, int]] = ()
    others: Sequence[tuple[str, Sequence[Bin]]] = field(default=())


@dataclass(slots=True)
class _Plot:
    """A chart's place on the grid and its two axes."""

    grid: Grid
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

    def column(self, position: float) -> int:
        """Return the raster column of a horizontal position."""
        last = self.cells * self.raster.columns - 1
        return min(last, max(0, int((position - self.low) * self.per_x)))

    def dot(self, value: float) -> float:
        """Return the raster row of a value, 0 at the top; outside the chart where it is clipped."""
        return (1.0 - self.scale.share(value)) * (self.rows * self.raster.rows) - 0.5

    def position(self, step: float, time: float) -> float:
        """Return the horizontal position of a point."""
        return time - self.origin if self.by_time else step


def draw_chart(grid: Grid, y: int, x: int, width: int, height: int, chart: Chart, glyphs: str) -> Scale | None:
    """Draw a chart into a rectangle of the grid.

    Args:
        grid: Where to draw.
        y: Top row.
        x: Left cell.
        width: Cells, labels included.
        height: Rows, the axis and its labels included.
        chart: What to draw.
        glyphs: "braille", "blocks" or "ascii".

    Returns:
        The vertical axis chosen, or None where there was nothing to draw.
    """
    rows, cells = height - 2, width - LABEL_WIDTH - 1
    points = [point for point in chart.points if abs(point[2]) < HUGE]
    scale = choose_scale(chart.bins, chart.scale, chart.prefer_log, [value for _, _, value in points])
    if rows < 1 or cells < 2 or scale is None:
        if height > 0:
            text = "no finite value yet" if chart.bins else "waiting for the first value"
            grid.put(y + height // 2, x + max(1, (width - len(text)) // 2), text, Style.DIM, x + width)
        return None
    by_time = chart.axis == "time"
    first, last = chart.bins[0], chart.bins[-1]
    low = first.first_time - chart.origin if by_time else first.first_step
    high = last.last_time - chart.origin if by_time else last.last_step
    raster = RASTERS[glyphs]
    per_x = (cells * raster.columns - 1) / (high - low) if high > low else 0.0
    plot = _Plot(grid, y, x + LABEL_WIDTH + 1, rows, cells, raster, scale, low, per_x, by_time, chart.origin)
    _draw_axes(plot, chart, high)
    _draw_lines(plot, chart)
    _draw_points(plot, points)
    _draw_outliers(plot, chart.bins)
    return scale


def _draw_axes(plot: _Plot, chart: Chart, high: float) -> None:
    grid, left, base = plot.grid, plot.x - 1, plot.y + plot.rows
    labels = dict(y_ticks(plot.scale, plot.rows))
    for row in range(plot.rows):
        label = labels.get(row)
        grid.put(plot.y + row, left, "┤" if label else "│", Style.DIM)
        if label:
            grid.put(plot.y + row, left - LABEL_WIDTH, label.rjust(LABEL_WIDTH), Style.DIM, left)
    grid.put(base, left, "└" + "─" * plot.cells, Style.DIM)
    _draw_x_labels(plot, chart, high)
    taken: dict[int, str] = {}
    for step, time, icon in sorted(chart.marks, key=lambda mark: _MARK_ORDER.find(mark[2])):
        position = plot.position(step, time)
        if plot.low <= position <= high:
            cell = plot.column(position) // plot.raster.columns
            if taken.get(cell, icon) != icon:
                cell -= 1
            if cell >= 0 and cell not in taken:
                taken[cell] = icon
                grid.put(base, plot.x + cell, icon, _MARK_STYLES.get(icon, Style.MARK))


def _draw_x_labels(plot: _Plot, chart: Chart, high: float) -> None:
    grid, base = plot.grid, plot.y + plot.rows
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


def _draw_lines(plot: _Plot, chart: Chart) -> None:
    size = plot.rows * plot.cells
    band, line = [0] * size, [0] * size
    lows, highs, ends = _columns(plot, chart.bins, chart.average)
    limit = plot.rows * plot.raster.rows - 1
    for column, (lo, hi) in enumerate(zip(lows, highs, strict=True)):
        if lo <= hi:
            _band(plot, band, column, _clamp(plot.dot(hi), limit), _clamp(plot.dot(lo), limit))
    _blit(plot, band, Style.DIM, solid=plot.raster.columns == 1)
    letters = []
    for letter, bins in chart.others:
        other = [0] * size
        end = _trace(plot, other, _columns(plot, bins, chart.average)[2])
        _blit(plot, other, Style.MARK)
        if end is not None:
            letters.append((end, letter))
    _trace(plot, line, ends)
    _blit(plot, line, Style.ACCENT)
    for (column, row), letter in letters:
        cell = min(plot.cells - 1, column // plot.raster.columns + 1)
        plot.grid.put(plot.y + row // plot.raster.rows, plot.x + cell, letter, Style.MARK)


def _columns(
    plot: _Plot, bins: Sequence[Bin], average: int | None
) -> tuple[list[float], list[float], list[float | None]]:
    """Spread the bins over the raster columns that they cover.

    Returns:
        Lowest and highest value of each column (inf and -inf where there is none), and the value of
        the line at its end: None where no bin ends, NaN where the line breaks.
    """
    columns = plot.cells * plot.raster.columns
    lows, highs = [math.inf] * columns, [-math.inf] * columns
    ends: list[float | None] = [None] * columns
    low, per_x, most, by_time = plot.low + (plot.origin if plot.by_time else 0.0), plot.per_x, columns - 1, plot.by_time
    for first_step, last_step, first_time, last_time, lo, hi, last, _, _, averages in bins:
        start, end = (first_time, last_time) if by_time else (first_step, last_step)
        first, column = int((start - low) * per_x), int((end - low) * per_x)
        # Conditions instead of min() and max(): this loop is half of a frame.
        column = 0 if column < 0 else most if column > most else column  # noqa: FURB136 - calls cost more
        if lo > hi:
            if ends[column] is None:
                ends[column] = math.nan
            continue
        ends[column] = last if average is None else averages[average]
        if lo < lows[column]:
            lows[column] = lo
        if hi > highs[column]:
            highs[column] = hi
        for covered in range(max(0, first), column):
            lows[covered] = min(lo, lows[covered])
            highs[covered] = max(hi, highs[covered])
    return lows, highs, ends


def _clamp(dot: float, limit: int) -> int:
    return 0 if dot < 0 else limit if dot > limit else round(dot)


def _band(plot: _Plot, bits: list[int], column: int, top: int, bottom: int) -> None:
    """Set every other dot of a raster column, and both ends: a texture that the line stands out from."""
    _run(plot, bits, column, top, top)
    if bottom > top:
        _run(plot, bits, column, bottom, bottom)
        _run(plot, bits, column, top, bottom, plot.raster.texture)


def _run(plot: _Plot, bits: list[int], column: int, top: int, bottom: int, mask: int = -1) -> None:
    """Set the dots of one raster column from `top` to `bottom`, as far as `mask` has them."""
    raster, cells = plot.raster, plot.cells
    per_cell, runs = raster.rows, raster.runs[column % raster.columns]
    first, start = divmod(top, per_cell)
    last, end = divmod(bottom, per_cell)
    at = first * cells + column // raster.columns
    if first == last:
        bits[at] |= runs[start][end] & mask
        return
    bits[at] |= runs[start][-1] & mask
    full = runs[0][-1] & mask
    for _ in range(first + 1, last):
        at += cells
        bits[at] |= full
    bits[at + cells] |= runs[0][end] & mask


def _trace(plot: _Plot, bits: list[int], ends: Sequence[float | None]) -> tuple[int, int] | None:
    """Draw a connected line through the columns' values.

    Returns:
        Raster column and row of the line's end, or None where there is no line.
    """
    limit = plot.rows * plot.raster.rows - 1
    previous: tuple[int, int] | None = None
    for column, value in enumerate(ends):
        if value is None:
            continue
        if math.isnan(value):
            previous = None
            continue
        row = _clamp(plot.dot(value), limit)
        if previous is None:
            _run(plot, bits, column, row, row)
        else:
            _connect(plot, bits, previous, (column, row))
        previous = (column, row)
    return previous


def _connect(plot: _Plot, bits: list[int], start: tuple[int, int], end: tuple[int, int]) -> None:
    """Draw from one raster point to another, without the first."""
    (x0, y0), (x1, y1) = start, end
    before = y0
    for column in range(x0 + 1, x1 + 1):
        row = y0 + round((y1 - y0) * (column - x0) / (x1 - x0))
        if row > before:
            _run(plot, bits, column, before + 1, row)
        elif row < before:
            _run(plot, bits, column, row, before - 1)
        else:
            _run(plot, bits, column, row, row)
        before = row


def _blit(plot: _Plot, bits: list[int], style: Style, solid: bool = False) -> None:
    glyphs, cells, put = plot.raster.glyphs, plot.cells, plot.grid.put
    for row in range(plot.rows):
        part = bits[row * cells : (row + 1) * cells]
        if not any(part):
            continue
        cell = 0
        while cell < cells:
            if not part[cell]:
                cell += 1
                continue
            end = cell
            while end < cells and part[end]:
                end += 1
            text = "░" * (end - cell) if solid else "".join([glyphs[b] for b in part[cell:end]])
            put(plot.y + row, plot.x + cell, text, style)
            cell = end


def _draw_points(plot: _Plot, points: Sequence[tuple[float, float, float]]) -> None:
    limit = plot.rows * plot.raster.rows - 1
    for step, time, value in points:
        position = plot.position(step, time)
        if position >= plot.low:
            cell = plot.column(position) // plot.raster.columns
            plot.grid.put(plot.y + _clamp(plot.dot(value), limit) // plot.raster.rows, plot.x + cell, "●", Style.MARK)


def _draw_outliers(plot: _Plot, bins: Sequence[Bin]) -> None:
    """Mark what the vertical range leaves out: ▲value above, ▼value below, × for not finite."""
    above: dict[int, float] = {}
    below: dict[int, float] = {}
    bad: set[int] = set()
    low, high = plot.scale.low, plot.scale.high
    for item in bins:
        if item.hi <= high and item.lo >= low and not item.bad:
            continue
        cell = plot.column(plot.position(item.first_step, item.first_time)) // plot.raster.columns
        if item.bad:
            bad.add(cell)
        if item.lo > item.hi:
            continue
        if item.hi > high:
            above[cell] = max(item.hi, above.get(cell, item.hi))
        if item.lo < low:
            below[cell] = min(item.lo, below.get(cell, item.lo))
    _label_outliers(plot, plot.y, "▲", above, bad)
    _label_outliers(plot, plot.y + plot.rows - 1, "▼", below, set())
    for cell in bad:
        plot.grid.put(plot.y, plot.x + cell, "×", Style.BAD)


def _label_outliers(plot: _Plot, y: int, arrow: str, values: dict[int, float], taken: set[int]) -> None:
    """Draw every arrow, and the values of the most extreme ones where there is room."""
    used = set(values) | taken
    for cell in values:
        plot.grid.put(y, plot.x + cell, arrow, Style.WARN)
    for cell, value in sorted(values.items(), key=lambda pair: -abs(pair[1])):
        text = f.short(value)
        for start in (cell + 1, cell - len(text)):
            place = set(range(start - 1, start + len(text) + 1)) - {cell}
            inside = start >= 0 and start + len(text) <= plot.cells
            if inside and not place & used:
                plot.grid.put(y, plot.x + start, text, Style.WARN)
                used |= place
                break
