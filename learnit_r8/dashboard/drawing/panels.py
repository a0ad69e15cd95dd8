"""The panes: charts, difficulty, events and console. The numbers' pane is in `now_pane.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from learnit_r8.dashboard.drawing.cells import Grid, clip, clip_middle
from learnit_r8.dashboard.drawing.charts import Chart, draw_chart
from learnit_r8.dashboard.drawing.glyphs import bar, sparkline
from learnit_r8.dashboard.drawing.layout import WIDE, Rect
from learnit_r8.dashboard.drawing.scales import Scale
from learnit_r8.dashboard.keys import TO_FIT, ViewState
from learnit_r8.events import QuadrantsRefreshed, SuspectsNamed
from learnit_r8.run import formats as f
from learnit_r8.run.journal import Entry
from learnit_r8.run.model import DECAYS, DashboardModel
from learnit_r8.run.series import Bins, Series
from learnit_r8.run.styles import Style

Piece = tuple[str, Style]
_LOOKS_BACK = 30
"""An average looks back over at most one such part of what is shown."""
_LOG_WORDS = ("loss", "lr", "grad", "norm", "ppl", "perplexity", "nll")
FAULTS = "!RXW"
"""Icons of events that are kept in view."""
_AXIS_LEGEND = (("!", "spike"), ("R", "rollback"), ("C", "ckpt"), ("V", "val"), ("P", "phase"), ("L", "lr found"))


def write(grid: Grid, rect: Rect, row: int, *parts: Piece, indent: int = 0) -> int:
    """Write styled pieces one after the other into a pane's row, the title's being -1; return the cell after them."""
    return grid.put_all(rect.y + 1 + row, rect.x + indent, parts, rect.x + rect.width)


def heading(grid: Grid, rect: Rect, number: int, name: str, view: ViewState, parts: Sequence[Piece] = ()) -> None:
    """Write a pane's title into the line above it; the pane in focus has angles round its number."""
    focused = number and view.focus == number
    shown = [(f" {name} ", Style.REVERSE if focused else Style.TITLE)]
    if number:
        shown.append((f"‹{number}› ", Style.REVERSE) if focused else (f"[{number}] ", Style.DIM))
    x = write(grid, rect, -1, *shown)
    for text, style in parts:
        if x + len(text) + 2 > rect.x + rect.width:
            break
        x = write(grid, rect, -1, (f" {text} ", style), indent=x - rect.x)


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
    names = ("val_loss", "val/loss", "eval_loss", "valid_loss") if name == "loss" else ()
    return next((twin for twin in names if twin in model.metrics), None)


def chart_series(model: DashboardModel, name: str, others: Sequence[DashboardModel] = ()) -> list[Series]:
    """Return every series that a metric's chart shows, its own first."""
    own = [model.metric_series(one) for one in (name, _validation_twin(model, name)) if one]
    return own + [other.metric_series(name) for other in others if name in other.metric_names()]


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
    twin = _validation_twin(model, name)
    seen = None if twin is None else window_bins(model, model.metric_series(twin), view)
    lines = [
        (chr(ord("a") + i), window_bins(other, other.metric_series(name), view))
        for i, other in enumerate(others)
        if name in other.metric_names()
    ]
    return Chart(
        bins,
        average=None if name == "lr" else _average(series, bins, view.smoothing),
        axis=view.x_axis,
        origin=model.started - model.spent_before if math.isfinite(model.started) else 0.0,
        scale=view.scale,
        prefer_log=any(word in name.casefold() for word in _LOG_WORDS),
        marks=[(step, time, icon) for icon, places in model.marks.items() for step, time in places],
        points=[] if seen is None else seen[["last_step", "last_time", "last"]].tolist(),
        epochs=model.epoch_starts,
        others=lines,
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
    window = f"x:{view.x_axis}  win:{window}"
    line = "value" if chart.average is None else f"ema{DECAYS[chart.average]:g}".replace("0.", ".")
    if grid.width >= WIDE:
        parts = [(f"━ {line}", Style.ACCENT), ("░ min-max", Style.DIM)]
        parts += [("● val", Style.MARK)] if chart.points else []
        parts += [(f"{letter} run", Style.MARK) for letter, _ in chart.others]
        parts.append((f"y:{kind}  {window}", Style.DIM))
    else:
        names = model.metric_names()
        at = names.index(name)
        parts = [(f"‹ {names[at - 1]} · {names[(at + 1) % len(names)]} ›", Style.DIM)]
        parts.append((f"y:{kind}  {line}  {window}", Style.DIM))
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
    x = 0
    for icon, meaning in shown:
        if x + len(icon) + len(meaning) + 1 > rect.width:
            break
        parts = ((icon, Style.BOLD), (f" {meaning}  ", Style.DIM))
        x = write(grid, rect, rect.height - 1, *parts, indent=x) - rect.x


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
    heading(grid, rect, 3, "difficulty", view, [("loss quartiles, Q4 is hardest", Style.DIM)])
    draws = [n * uses for n, uses in zip(found.counts, found.uses, strict=False)]
    total = sum(draw for draw in draws if math.isfinite(draw)) or math.nan
    shares = [draw / total for draw in draws]
    known = range(min(len(shares), len(found.losses), len(found.easier), len(found.edges) - 1))
    if rect.height < 6:
        _difficulty_short(grid, rect, model, found, shares)
        return
    write(grid, rect, 0, ("Q     loss range        n  draws       used×  easier  trend", Style.DIM))
    for q in known:
        easier = f"{100 * found.easier[q]:3.0f}%" if q and math.isfinite(found.easier[q]) else "   -"
        line = (
            f"{_edges(found.edges[q], found.edges[q + 1], 13)}{_samples(found.counts[q]):>7}  {bar(shares[q], 5, ' ')}"
            f" {_share(shares[q])}  {f.brief(found.uses[q]):>5}    {easier}  {_trend(model, q, 6)}"
        )
        write(grid, rect, 1 + q, (f"Q{q + 1}  ", _quarter_style(q)), (line, Style.NORMAL))
    stuck = 100 * found.stuck / max(1, sum(found.counts))
    last = f"unseen {f.steps(found.unseen)}   stuck>5 epochs {f.steps(found.stuck)} ({stuck:.1f}%)"
    last += "   3 Enter: worst" if model.suspects else ""
    write(grid, rect, 5, (last, Style.WARN if found.stuck else Style.DIM))
    if rect.height > 8 and model.suspects is not None:
        _worst_list(grid, rect, model.suspects)


def _quarter_style(q: int) -> Style:
    return Style.WARN if q == 3 else Style.BOLD


def _share(share: float, unknown: str = "  --") -> str:
    return f"{100 * share:3.0f}%" if math.isfinite(share) else unknown


def _difficulty_short(
    grid: Grid, rect: Rect, model: DashboardModel, found: QuadrantsRefreshed, shares: Sequence[float]
) -> None:
    half = rect.width // 2
    for q in range(min(4, len(found.counts), len(found.losses), len(found.edges) - 1)):
        share = _share(shares[q] if q < len(shares) else math.nan, " --%")
        text = f" {_edges(found.edges[q], found.edges[q + 1], 13)} {_trend(model, q, 5):5} {share}"
        text += f"  stuck {f.count(found.stuck)}" if q == 3 and found.stuck else ""
        side = replace(rect, width=rect.width if q % 2 else half)
        parts = ((f"Q{q + 1}", _quarter_style(q)), (text, Style.NORMAL))
        write(grid, side, q // 2, *parts, indent=q % 2 * half)


def _worst_list(grid: Grid, rect: Rect, found: SuspectsNamed) -> None:
    head = f"{f.steps(found.count)} suspects, likely wrong rather than hard; the worst first: sample, loss"
    write(grid, rect, 7, (head, Style.BOLD))
    rows = rect.height - 8
    for i, (index, loss) in enumerate(zip(found.indices, found.losses, strict=False)):
        indent = i // rows * 24
        if indent + 22 > rect.width:
            break
        write(
            grid, rect, 8 + i % rows, (f"{f.sample(index, 12):>12}  {f.number(loss, 8)}", Style.NORMAL), indent=indent
        )


def events_pane(grid: Grid, rect: Rect, model: DashboardModel, view: ViewState, tabs: bool = False) -> None:
    """Draw the newest events, the latest on top."""
    hint = [(f"/{view.filter}{'_' if view.editing else ''}", Style.WARN)] if view.filter or view.editing else []
    if tabs:
        hint.append(("6 console", Style.DIM))
    heading(grid, rect, 5, "events", view, hint)
    lines = [line for line in reversed(model.entries) if not view.filter or line.matches(view.filter)]
    start = min(view.scroll, max(0, len(lines) - rect.height)) if view.focus == 5 else 0
    wide = grid.width >= WIDE
    shown = lines[start : start + rect.height] if start or view.filter else _pinned(lines, rect.height)
    if not lines:
        write(grid, rect, 0, ("nothing matches" if view.filter else "none yet", Style.DIM))
    for i, line in enumerate(shown):
        time = f.of_day(line.time, view.utc_offset, "%H:%M:%S" if wide else "%H:%M")
        when = f"{time}  {f.steps(line.step):>10}  " if wide else f"{time} {line.step:>8} "
        x = write(grid, rect, i, (when, Style.DIM), (f"{line.icon} {line.kind:<11} ", line.style))
        room = rect.x + rect.width - x
        write(grid, rect, i, (clip(line.text, room), Style.NORMAL), indent=rect.width - room)


def _pinned(lines: Sequence[Entry], rows: int) -> Sequence[Entry]:
    """Return the newest lines; the last faults keep up to half of the rows where routine would push them out."""
    newest = lines[:rows]
    missed = sum(line.icon in FAULTS for line in newest)
    older = [line for line in lines[rows:] if line.icon in FAULTS][: max(0, rows // 2 - missed)]
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
        write(grid, rect, i, (clip(line.replace("\t", "    "), rect.width), Style.NORMAL))
