"""The panes: charts, difficulty, events and console. The numbers' pane is in `now_pane.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from learnit_r8.dashboard.drawing.cells import Grid, clip, clip_middle
from learnit_r8.dashboard.drawing.charts import Chart, draw_chart
from learnit_r8.dashboard.drawing.glyphs import bar, sparkline
from learnit_r8.dashboard.drawing.layout import WIDE, Rect
from learnit_r8.dashboard.drawing.scales import Scale
from learnit_r8.dashboard.keys import TO_FIT, ViewState
from learnit_r8.run import formats as f
from learnit_r8.run.journal import Entry
from learnit_r8.run.model import DECAYS, DashboardModel
from learnit_r8.run.series import Bins, Series
from learnit_r8.run.styles import Style

Piece = tuple[str, Style]
_LOOKS_BACK = 30
"""An average looks back over at most one such part of what is shown."""
_LOG_WORDS = ("loss", "lr", "grad", "norm", "ppl", "perplexity", "nll")
_FAULTS = "!RXW"
"""Icons of events that are kept in view."""
_AXIS_LEGEND = (("!", "spike"), ("R", "rollback"), ("C", "ckpt"), ("V", "val"), ("P", "phase"), ("L", "lr found"))


def pieces(grid: Grid, y: int, x: int, limit: int, parts: Sequence[Piece]) -> int:
    """Write styled pieces one after the other and return the cell after them."""
    for text, style in parts:
        x = grid.put(y, x, text, style, limit)
    return x


def heading(grid: Grid, rect: Rect, number: int, name: str, view: ViewState, parts: Sequence[Piece] = ()) -> None:
    """Write a pane's title into the line above it; the pane in focus has angles round its number."""
    limit = rect.x + rect.width
    focused = number and view.focus == number
    x = grid.put(rect.y, rect.x, f" {name} ", Style.REVERSE if focused else Style.TITLE, limit)
    if number:
        mark = f"‹{number}› " if focused else f"[{number}] "
        x = grid.put(rect.y, x, mark, Style.REVERSE if focused else Style.DIM, limit)
    for text, style in parts:
        if x + len(text) + 2 > limit:
            break
        x = grid.put(rect.y, x, f" {text} ", style, limit)


def chosen_metric(model: DashboardModel, view: ViewState) -> str:
    """Return the name that the chart shows."""
    names = model.metric_names()
    return names[view.metric % len(names)]


def window_bins(model: DashboardModel, series: Series, view: ViewState) -> Bins:
    """Return the bins in the view's window."""
    if view.window == 0:
        return series.bins()
    share = 2.0**-view.window
    if view.x_axis == "time":
        return series.bins(model.last_time - share * (model.last_time - model.first_time), by_time=True)
    return series.bins(model.step * (1.0 - share))


def _validation_twin(model: DashboardModel, name: str) -> str | None:
    if name == "loss":
        return next((m for m in ("val_loss", "val/loss", "eval_loss", "valid_loss") if m in model.metrics), None)
    return None


def chart_series(model: DashboardModel, name: str, others: Sequence[DashboardModel] = ()) -> list[Series]:
    """Return every series that a metric's chart shows, its own first."""
    twin = _validation_twin(model, name)
    found = [model.metric_series(name), *([model.metric_series(twin)] if twin else [])]
    return found + [other.metric_series(name) for other in others if name in other.metric_names()]


def _average(series: Series, bins: Bins, smoothing: float) -> int | None:
    """Return which average to draw, None for the values: one that looks far back lies outside a short, falling run."""
    shown = float(bins["points"].sum()) if len(bins) else 0.0
    if smoothing == TO_FIT:
        smoothing = next((decay for decay in sorted(DECAYS)[::-1] if (1 - decay) * shown >= _LOOKS_BACK), 0.0)
    # A series logged once an epoch is short: its points are what matters, not their average.
    found = DECAYS.index(smoothing) if smoothing in DECAYS and series.count > 100 else len(DECAYS)
    return found if found < len(series.decays) else None


def chart_of(model: DashboardModel, view: ViewState, name: str, others: Sequence[DashboardModel] = ()) -> Chart:
    """Return the chart of a metric as the view wants it."""
    series = model.metric_series(name)
    bins = window_bins(model, series, view)
    average = None if name == "lr" else _average(series, bins, view.smoothing)
    twin = _validation_twin(model, name)
    points: list[tuple[float, float, float]] = []
    if twin is not None:
        found = window_bins(model, model.metrics[twin].series, view)
        points = list(zip(*(found[name].tolist() for name in ("last_step", "last_time", "last")), strict=True))
    lines = [
        (chr(ord("a") + i), window_bins(other, other.metric_series(name), view))
        for i, other in enumerate(others)
        if name in other.metric_names()
    ]
    return Chart(
        bins,
        average,
        view.x_axis,
        model.started - model.spent_before if math.isfinite(model.started) else 0.0,
        view.scale,
        any(word in name.casefold() for word in _LOG_WORDS),
        [(step, time, icon) for icon, places in model.marks.items() for step, time in places],
        points,
        model.epoch_starts,
        lines,
    )


def chart_pane(
    grid: Grid, rect: Rect, model: DashboardModel, view: ViewState, others: Sequence[DashboardModel] = ()
) -> None:
    """Draw the main chart with its legend."""
    name = chosen_metric(model, view)
    chart = chart_of(model, view, name, others)
    legend = rect.height >= 9
    height = rect.height - legend
    scale = draw_chart(grid, rect.y + 1, rect.x - 1, rect.width + 1, height, chart, view.glyphs)
    kind = "log" if scale is not None and scale.log else "lin"
    window = "all" if view.window == 0 else f"1/{2**view.window}"
    settings = f"y:{kind}  x:{view.x_axis}  win:{window}"
    line = "value" if chart.average is None else f"ema{DECAYS[chart.average]:g}".replace("0.", ".")
    if grid.width >= WIDE:
        parts = [(f"━ {line}", Style.ACCENT), ("░ min-max", Style.DIM)]
        parts += [("● val", Style.MARK)] if chart.points else []
        parts += [(f"{letter} run", Style.MARK) for letter, _ in chart.others]
        parts.append((settings, Style.DIM))
    else:
        names = model.metric_names()
        at = names.index(name)
        parts = [(f"‹ {names[at - 1]} · {names[(at + 1) % len(names)]} ›", Style.DIM)]
        parts.append((f"y:{kind}  {line}  x:{view.x_axis}  win:{window}", Style.DIM))
    heading(grid, rect, 1, name, view, parts)
    if legend:
        _legend(grid, rect, model, chart, scale)


def _legend(grid: Grid, rect: Rect, model: DashboardModel, chart: Chart, scale: Scale | None) -> None:
    shown = [(icon, meaning) for icon, meaning in _AXIS_LEGEND if icon in model.marks]
    if chart.bins["bad"].any():
        shown.insert(2, ("×", "not finite"))
    finite = chart.bins[chart.bins["points"] > chart.bins["bad"]]
    if scale is not None and ((finite["lo"] < scale.low) | (finite["hi"] > scale.high)).any():
        shown.append(("▲▼", "beyond the axis"))
    x, limit = rect.x, rect.x + rect.width
    for icon, meaning in shown:
        if x + len(icon) + len(meaning) + 1 > limit:
            break
        x = grid.put(rect.y + rect.height, x, icon, Style.BOLD)
        x = grid.put(rect.y + rect.height, x, f" {meaning}  ", Style.DIM, limit)


def small_chart_pane(grid: Grid, rect: Rect, model: DashboardModel, view: ViewState, name: str) -> None:
    """Draw a chart without a legend: the learning rate, or a further metric."""
    chart = chart_of(model, view, name)
    scale = draw_chart(grid, rect.y + 1, rect.x - 1, rect.width + 1, rect.height, chart, view.glyphs)
    last = model.metric_series(name).last
    parts = [(f.short(last), Style.BOLD)] if math.isfinite(last) else []
    if scale is not None and scale.log:
        parts.append(("y:log", Style.DIM))
    heading(grid, rect, 4 if name == "lr" else 0, clip_middle(name, max(4, rect.width - 12)), view, parts)


def _edges(low: float, high: float, width: int) -> str:
    return f"{_edge(low):>6}–{_edge(high):<6}"[:width].ljust(width)


def _edge(value: float) -> str:
    """Return a number in at most 6 characters down to 1e-99: one that is cut off would lose its exponent."""
    text = f.short(value)
    if len(text) <= 6:
        return text
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _samples(number: int) -> str:
    return f.steps(number) if number < 1_000_000 else f.count(number)


def _trend(model: DashboardModel, q: int, width: int) -> str:
    """Return a quadrant's mean loss over the epochs, on one logarithmic scale for all quadrants."""
    logs = [[math.log(x) if 0 < x < math.inf else math.nan for x in losses] for losses in model.quadrant_losses]
    finite = [x for losses in logs for x in losses if math.isfinite(x)]
    if not finite:
        return ""
    return sparkline([losses[q] for losses in logs if q < len(losses)], width, min(finite), max(finite))


def difficulty_pane(grid: Grid, rect: Rect, model: DashboardModel, view: ViewState) -> None:
    """Draw the quadrants as a table: six rows, two where the pane is short."""
    found = model.quadrants
    if found is None:
        return
    tall = rect.height >= 6
    heading(grid, rect, 3, "difficulty", view, [("loss quartiles, Q4 is hardest", Style.DIM)])
    y, x, limit = rect.y + 1, rect.x, rect.x + rect.width
    draws = [n * uses for n, uses in zip(found.counts, found.uses, strict=False)]
    total = sum(draw for draw in draws if math.isfinite(draw)) or math.nan
    rows = range(min(len(found.counts), len(found.losses), len(found.uses), len(found.easier), len(found.edges) - 1))
    if not tall:
        _difficulty_short(grid, rect, model, [draw / total for draw in draws])
        return
    grid.put(y, x, "Q     loss range        n  draws       used×  easier  trend", Style.DIM, limit)
    for q in rows:
        share = draws[q] / total
        trend = _trend(model, q, 6)
        percent = f"{100 * share:3.0f}%" if math.isfinite(share) else "  --"
        easier = f"{100 * found.easier[q]:3.0f}%" if q and math.isfinite(found.easier[q]) else "   -"
        name = Style.WARN if q == 3 else Style.BOLD
        line = (
            f"{_edges(found.edges[q], found.edges[q + 1], 13)}{_samples(found.counts[q]):>7}  {bar(share, 5, ' ')}"
            f" {percent}  {f.brief(found.uses[q]):>5}    {easier}  {trend}"
        )
        pieces(grid, y + 1 + q, x, limit, [(f"Q{q + 1}  ", name), (line, Style.NORMAL)])
    stuck = 100 * found.stuck / max(1, sum(found.counts))
    last = f"unseen {f.steps(found.unseen)}   stuck>5 epochs {f.steps(found.stuck)} ({stuck:.1f}%)"
    last += "   3 Enter: worst" if model.suspects else ""
    grid.put(y + 5, x, last, Style.WARN if found.stuck else Style.DIM, limit)
    if rect.height > 8 and model.suspects is not None:
        _worst_list(grid, y + 7, rect, model)


def _difficulty_short(grid: Grid, rect: Rect, model: DashboardModel, shares: Sequence[float]) -> None:
    found = model.quadrants
    if found is None:
        return
    half = rect.width // 2
    for q in range(min(4, len(found.counts), len(found.losses), len(found.edges) - 1)):
        trend = _trend(model, q, 5)
        share = f"{100 * shares[q]:3.0f}%" if q < len(shares) and math.isfinite(shares[q]) else " --%"
        text = f" {_edges(found.edges[q], found.edges[q + 1], 13)} {trend:5} {share}"
        text += f"  stuck {f.count(found.stuck)}" if q == 3 and found.stuck else ""
        y, x = rect.y + 1 + q // 2, rect.x + q % 2 * half
        end = rect.x + rect.width if q % 2 else x + half
        pieces(grid, y, x, end, [(f"Q{q + 1}", Style.WARN if q == 3 else Style.BOLD), (text, Style.NORMAL)])


def _worst_list(grid: Grid, y: int, rect: Rect, model: DashboardModel) -> None:
    found = model.suspects
    if found is None:
        return
    head = f"{f.steps(found.count)} suspects, likely wrong rather than hard; the worst first: sample, loss"
    grid.put(y, rect.x, head, Style.BOLD, rect.x + rect.width)
    rows = rect.y + rect.height - y
    if rows <= 0:
        return
    for i, (index, loss) in enumerate(zip(found.indices, found.losses, strict=False)):
        x = rect.x + i // rows * 24
        if x + 22 > rect.x + rect.width:
            break
        grid.put(y + 1 + i % rows, x, f"{index:>12}  {f.number(loss, 8)}", Style.NORMAL, rect.x + rect.width)


def events_pane(grid: Grid, rect: Rect, model: DashboardModel, view: ViewState, tabs: bool = False) -> None:
    """Draw the newest events, the latest on top."""
    hint = [(f"/{view.filter}{'_' if view.editing else ''}", Style.WARN)] if view.filter or view.editing else []
    if tabs:
        hint.append(("6 console", Style.DIM))
    heading(grid, rect, 5, "events", view, hint)
    lines = [line for line in reversed(model.entries) if not view.filter or line.matches(view.filter)]
    start = min(view.scroll, max(0, len(lines) - rect.height)) if view.focus == 5 else 0
    limit = rect.x + rect.width
    wide = grid.width >= WIDE
    shown = lines[start : start + rect.height] if start or view.filter else _pinned(lines, rect.height)
    if not lines:
        grid.put(rect.y + 1, rect.x, "nothing matches" if view.filter else "none yet", Style.DIM, limit)
    for i, line in enumerate(shown):
        y = rect.y + 1 + i
        time = f.of_day(line.time, view.utc_offset, "%H:%M:%S" if wide else "%H:%M")
        x = grid.put(y, rect.x, f"{time}  {f.steps(line.step):>10}  " if wide else f"{time} {line.step:>8} ", Style.DIM)
        x = grid.put(y, x, f"{line.icon} {line.kind:<11} ", line.style, limit)
        grid.put(y, x, clip(line.text, limit - x), Style.NORMAL, limit)


def _pinned(lines: Sequence[Entry], rows: int) -> Sequence[Entry]:
    """Return the newest lines; the last faults keep up to half of the rows where routine would push them out."""
    newest = lines[:rows]
    missed = sum(line.icon in _FAULTS for line in newest)
    older = [line for line in lines[rows:] if line.icon in _FAULTS][: max(0, rows // 2 - missed)]
    return [*newest[: rows - len(older)], *older]


def console_pane(grid: Grid, rect: Rect, view: ViewState, lines: Sequence[str], tabs: bool = False) -> None:
    """Draw the newest lines that the user's code printed, the latest at the bottom."""
    hint = [(clip(view.console_title, max(8, rect.width - 20)), Style.DIM)] if view.console_title else []
    if tabs:
        hint.append(("5 events", Style.DIM))
    heading(grid, rect, 6, "console", view, hint)
    if view.filter:
        needle = view.filter.casefold()
        lines = [line for line in lines if needle in line.casefold()]
    end = len(lines) - (min(view.scroll, max(0, len(lines) - rect.height)) if view.focus == 6 else 0)
    for i, line in enumerate(lines[max(0, end - rect.height) : end]):
        grid.put(rect.y + 1 + i, rect.x, clip(line.replace("\t", "    "), rect.width), limit=rect.x + rect.width)
