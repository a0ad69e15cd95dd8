"""Numbers to cells: a painter draws frame after frame, and of each only what has changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from learnit_r8.dashboard.drawing.cells import Grid
from learnit_r8.dashboard.drawing.layout import (
    MIN_HEIGHT,
    MIN_WIDTH,
    PANES,
    ROOMY,
    WIDE,
    Band,
    Boxes,
    Pane,
    Rect,
    Scene,
    allot,
    place,
)
from learnit_r8.dashboard.drawing.now_pane import now_pane, run_pane
from learnit_r8.dashboard.drawing.panels import (
    chart_pane,
    chart_series,
    chosen_metric,
    console_pane,
    difficulty_pane,
    events_pane,
    small_chart_pane,
)
from learnit_r8.dashboard.drawing.surround import bare, key_line, overlay, progress, title
from learnit_r8.dashboard.keys import ViewState
from learnit_r8.run.model import LATEST, DashboardModel
from learnit_r8.run.styles import Style

__all__ = ["Grid", "Painter", "Scene", "Style", "render", "scroll_limit"]

# What draws each kind of pane, in the order in which they follow each other down the screen.
_DRAW: dict[str, Callable[[Pane], None]] = {
    "chart": chart_pane,
    "now": now_pane,
    "run": run_pane,
    "metric": small_chart_pane,
    "difficulty": difficulty_pane,
    "events": events_pane,
    "console": console_pane,
}
_ORDER = list(_DRAW)
_OTHER_KEY = {"events": [("6 console", Style.DIM)], "console": [("5 events", Style.DIM)]}
_CHART_PERIODS = 4
_SMALL_CHARTS = 3
"""The small charts are drawn anew in every third such period of the main one."""
_NOW_WIDTH, _DIFFICULTY_WIDTH, _METRIC_WIDTH, _RUN_WIDTH = 46, 62, 48, 44


def render(scene: Scene, view: ViewState, width: int, height: int, now: float) -> Grid:
    """Draw one frame; the arguments are those of `Painter.draw`."""
    return Painter().draw(scene, view, width, height, now)


class Painter:
    """Draws frames of a run that goes on; a pane is drawn anew where what it shows has changed.

    Args:
        chart_seconds: A chart is drawn anew when its line has grown by a column of dots, no more often than this and at
            least every fourth of these periods, and a frame draws no more than a third of them anew. 0: all in each.
        between: Called between panes: the place to let another thread run.
    """

    def __init__(self, chart_seconds: float = 0.0, between: Callable[[], object] = lambda: None) -> None:
        self.chart_seconds, self._between = chart_seconds, between
        self._grid = self._lines = Grid(0, 0)
        self._rects: list[Rect] = []
        self._tabs = False
        self._model: DashboardModel | None = None
        self._layout: tuple[object, ...] = ()
        self._view = ViewState()
        self._shown: dict[Rect, object] = {}
        self._charts: dict[Rect, tuple[object, int, float]] = {}

    def draw(self, scene: Scene, view: ViewState, width: int, height: int, now: float) -> Grid:
        """Draw one frame at wall-clock time `now`.

        Returns:
            A grid of exactly `height` rows of `width` cells, whatever the size. The next call draws into it again.
        """
        model = scene.model
        now = now if abs(now) < LATEST else model.last_time
        if width < MIN_WIDTH or height < MIN_HEIGHT:
            self._layout = ()
            grid = Grid(width, height, ascii_only=view.glyphs == "ascii")
            bare(grid, model, now)
            return grid
        self._lay_out(scene, view, width, height)
        grid, self._view = self._grid, view
        for y in (0, height - 2):
            grid.restore(self._lines, y, 0, width)
        title(grid, model, view, now)
        self.advance(model, now)
        key_line(grid, height - 2, 2, width - 4, view, now)
        self._between()
        late = self._late_charts(scene, view, now)
        for rect in self._rects:
            if rect in late or self._changed(rect, scene, view):
                for y in range(rect.y, rect.y + rect.height + 1):
                    grid.restore(self._lines, y, rect.x - 1, rect.width + 2)
                other_key = _OTHER_KEY.get(rect.name, ()) if self._tabs else ()
                _DRAW[rect.kind](Pane(grid, rect, scene, view, now, other_key))
                self._between()
        if view.help or view.confirm:
            overlay(grid, view)
            self._layout = ()
        return grid

    def advance(self, model: DashboardModel, now: float) -> Grid | None:
        """Draw how far the run is into the frame before; None where that was no frame of this run, or is covered."""
        if not self._layout or model is not self._model:
            return None
        grid = self._grid
        for y in (1, 2):
            grid.restore(self._lines, y, 0, grid.width)
        progress(grid, 1, 2, grid.width - 4, model, self._view, now)
        return grid

    def _lay_out(self, scene: Scene, view: ViewState, width: int, height: int) -> None:
        """Place the panes; where the places or the view are not those of the frame before, everything is drawn anew."""
        model, lines = scene.model, len(scene.lines) or bool(view.console_title)
        # What changes by itself is of no concern to the panes, or is looked at there.
        steady = replace(view, paused=False, opened=0.0, hz=None, ui_share=None, gpus=(), host=(), console_title="")
        sizes = (min(height, len(model.entries)), len(model.metrics), model.quadrants is None, min(height, lines))
        layout = (steady, width, height, len(scene.others), *sizes)
        if layout == self._layout and model is self._model:
            return
        boxes = Boxes()
        for y in (0, height - 1):
            boxes.horizontal(y, 0, width - 1)
        for x in (0, width - 1):
            boxes.vertical(x, 0, height - 1)
        rects = _arrange(model, view, width, height, boxes, lines)
        # Where only one of the two has room, its title names the key of the other.
        tabs = bool(scene.lines) and not view.zoomed and not _OTHER_KEY.keys() <= {rect.name for rect in rects}
        same = model is self._model and (rects, tabs, layout[:4]) == (self._rects, self._tabs, self._layout[:4])
        self._layout, self._model, self._rects, self._tabs = layout, model, rects, tabs
        if same:
            return
        self._shown, self._charts = {}, {}
        self._lines, self._grid = (Grid(width, height, ascii_only=view.glyphs == "ascii") for _ in range(2))
        boxes.draw(self._lines)
        for y in range(height):
            self._grid.restore(self._lines, y, 0, width)

    def _late_charts(self, scene: Scene, view: ViewState, now: float) -> list[Rect]:
        """Return the charts to draw anew: a third of them, those that have waited longest, unless none may wait."""
        found: list[tuple[bool, float, int, Rect, tuple[object, int, float]]] = []
        model = scene.model
        marks = tuple((len(places), places[-1]) for places in model.marks.values())
        for rect in self._rects:
            if rect.kind not in {"chart", "metric"}:
                continue
            series = chart_series(model, rect.metric or chosen_metric(model, view), scene.others)
            points = sum(line.count for line in series) + (model.step if view.window else 0)
            shown = (marks, len(model.epoch_starts), model.started)
            before, drawn, when = self._charts.get(rect, (None, -1, now))
            grown = points - drawn >= points * 0.5**view.window / (2 * rect.width)
            usual = 1 if rect.kind == "chart" else _SMALL_CHARTS
            patience = self.chart_seconds * usual * (1 if grown else _CHART_PERIODS)
            if shown != before or (points != drawn and abs(now - when) >= patience):
                found.append((drawn >= 0, (when - now) / usual, len(found), rect, (shown, points, now)))
        found.sort(key=lambda chart: chart[:3])
        most = sum(not chart[0] for chart in found) or 1 + len(found) // 3
        chosen = found[:most] if self.chart_seconds else found
        self._charts.update({rect: state for *_, rect, state in chosen})
        return [rect for *_, rect, _ in chosen]

    def _changed(self, rect: Rect, scene: Scene, view: ViewState) -> bool:
        """Return whether a pane that is no chart shows something else than it did; what it shows is remembered."""
        model, before = scene.model, self._shown.get(rect)
        match rect.name:
            case "now" | "run":
                return True
            case "events" | "console" if view.focus:
                return True
            case "difficulty":
                shown: object = (model.quadrants, model.suspects)
            case "events":
                shown = (model.entries[-1] if model.entries else None,)
            case "console":
                shown = (view.console_title, *scene.lines[-rect.height :])
            case _:
                return False
        self._shown[rect] = shown
        return shown != before


def scroll_limit(model: DashboardModel, view: ViewState, console_lines: Sequence[str]) -> int:
    """Return how many lines the pane in focus can be scrolled at most."""
    lengths = {2: len(model.metric_names()), 5: len(model.entries), 6: len(console_lines)}
    return max(0, lengths.get(view.focus, 0) - 1)


def _arrange(model: DashboardModel, view: ViewState, width: int, height: int, boxes: Boxes, lines: int) -> list[Rect]:
    """Choose the panes and their places between the progress bars and the key line."""
    wide = width >= WIDE
    rows = height - (5 if wide else 6)
    if not wide:
        boxes.horizontal(height - 3, 0, width - 1)
    if view.zoomed and view.focus:
        bands = [Band(((PANES[view.focus], 0),), rows - 1, rows - 1)]
    else:
        bands = _wide_bands(model, view, width, rows, lines) if wide else _narrow_bands(model, view, rows, lines)
    # The order of importance is chart first; on the screen further charts follow the main one.
    heights = allot(bands, rows)
    placed = sorted(zip(bands, heights, strict=True), key=lambda band: _ORDER.index(band[0].panes[0][0].split(":")[0]))
    return place(placed, 3, width, boxes)


def _charts(names: Sequence[str]) -> tuple[tuple[str, int], ...]:
    return tuple((f"metric:{name}", 0) for name in names)


def _spare_metrics(model: DashboardModel, view: ViewState) -> list[str]:
    """Return what else is worth a chart of its own, the user's numbers first."""
    names = [*model.metrics, "step ms", "surprise", "loss"]
    return [name for name in names if name != chosen_metric(model, view)]


def _wide_bands(model: DashboardModel, view: ViewState, width: int, rows: int, lines: int) -> list[Band]:
    run = (("run", _RUN_WIDTH),) if width >= ROOMY and model.config else ()
    bands = [Band((("chart", 0), ("now", _NOW_WIDTH), *run), 6, 11, share=3)]
    first = (("difficulty", _DIFFICULTY_WIDTH),) if model.quadrants is not None else ()
    columns = max(1, (width - (_DIFFICULTY_WIDTH if first else 0)) // _METRIC_WIDTH)
    spare = _spare_metrics(model, view)
    bands.append(Band((*first, *_charts(["lr", *spare[: columns - 1]])), 6, 6))
    bands.append(Band((("events", 0),), 2, 5, most=max(5, len(model.entries)), share=1))
    if lines:
        bands.append(Band((("console", 0),), 2, 4, most=max(4, lines), share=1))
    more = spare[columns - 1 :][: width // _METRIC_WIDTH]
    if more and rows - sum(band.usual + 1 for band in bands) >= 12:
        bands.append(Band(_charts(more), 8, 8, most=14, share=1))
    return bands


def _narrow_bands(model: DashboardModel, view: ViewState, rows: int, lines: int) -> list[Band]:
    bands = [Band((("chart", 0),), 5, 7, share=3), Band((("now", 0),), 2, 2)]
    if model.quadrants is not None:
        bands.append(Band((("difficulty", 0),), 2, 2))
    free = rows - sum(band.usual + 1 for band in bands)
    events = Band((("events", 0),), 2, 3, most=max(3, min(12, len(model.entries))), share=1)
    console = Band((("console", 0),), 2, 3, most=max(3, min(12, lines)), share=1)
    if lines and free >= 14:
        bands += [events, console]
    else:
        bands.append(console if lines and view.focus == 6 else events)
    if free >= 22:
        bands.append(Band(_charts(["lr", *_spare_metrics(model, view)[:1]]), 6, 7, most=12, share=1))
    return bands
