"""The panes: charts, difficulty, events and console. The numbers' pane is in `now_pane.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from learnit_r8.dashboard.drawing.cells import clip, clip_middle
from learnit_r8.dashboard.drawing.charts import Chart, draw_chart
from learnit_r8.dashboard.drawing.glyphs import bar, sparkline
from learnit_r8.dashboard.drawing.layout import Pane
from learnit_r8.dashboard.drawing.scales import Scale, in_six
from learnit_r8.dashboard.keys import TO_FIT, ViewState
from learnit_r8.events import QuadrantsRefreshed, SuspectsNamed
from learnit_r8.run import formats as f
from learnit_r8.run.journal import Entry
from learnit_r8.run.model import DECAYS, DashboardModel
from learnit_r8.run.series import Bins, Series
from learnit_r8.run.styles import Style

_LOOKS_BACK = 30
"""An average looks back over at most one such part of what is shown."""
_LOG_WORDS = ("loss", "lr", "grad", "norm", "ppl", "perplexity", "nll")
FAULTS = "!RXW"
"""Icons of events that are kept in view."""
_AXIS_LEGEND = (("!", "spike"), ("R", "rollback"), ("C", "ckpt"), ("V", "val"), ("P", "phase"), ("L", "lr found"))


def chosen_metric(model: DashboardModel, view: ViewState) -> str:
    names = model.metric_names()
    return names[view.metric % len(names)]


def window_bins(model: DashboardModel, series: Series, view: ViewState) -> Bins:
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


def _drawn(pane: Pane, chart: Chart, rows: int) -> Scale | None:
    rect = pane.rect
    return draw_chart(pane.grid, rect.y + 1, rect.x - 1, rect.width + 1, rows, chart, pane.view.glyphs)


def chart_pane(pane: Pane) -> None:
    model, view, rect = pane.scene.model, pane.view, pane.rect
    name = chosen_metric(model, view)
    chart = chart_of(model, view, name, pane.scene.others)
    legend = rect.height >= 9
    scale = _drawn(pane, chart, rect.height - legend)
    kind = "log" if scale is not None and scale.log else "lin"
    window = f"x:{view.x_axis}  win:{f'1/{2**view.window}' if view.window else 'all'}"
    line = "value" if chart.average is None else f"ema{DECAYS[chart.average]:g}".replace("0.", ".")
    if pane.wide:
        parts = [(f"━ {line}", Style.ACCENT), ("░ min-max", Style.DIM)]
        parts += [("● val", Style.MARK)] if chart.points else []
        parts += [(f"{letter} run", Style.MARK) for letter, _ in chart.others]
        parts.append((f"y:{kind}  {window}", Style.DIM))
    else:
        names = model.metric_names()
        at = names.index(name)
        parts = [(f"‹ {names[at - 1]} · {names[(at + 1) % len(names)]} ›", Style.DIM)]
        parts.append((f"y:{kind}  {line}  {window}", Style.DIM))
    pane.heading(name, *parts)
    if legend:
        _legend(pane, chart, scale)


def _legend(pane: Pane, chart: Chart, scale: Scale | None) -> None:
    shown = [(icon, meaning) for icon, meaning in _AXIS_LEGEND if icon in pane.scene.model.marks]
    if chart.bins["bad"].any():
        shown.insert(2, ("×", "not finite"))
    finite = chart.bins[chart.bins["points"] > chart.bins["bad"]]
    if scale is not None and ((finite["lo"] < scale.low) | (finite["hi"] > scale.high)).any():
        shown.append(("▲▼", "beyond the axis"))
    x = 0
    for icon, meaning in shown:
        if x + len(icon) + len(meaning) + 1 > pane.rect.width:
            break
        x = pane.write(pane.rect.height - 1, (icon, Style.BOLD), (f" {meaning}  ", Style.DIM), indent=x)


def small_chart_pane(pane: Pane) -> None:
    """Draw a chart without a legend: the learning rate, or a further metric."""
    name, model = pane.rect.metric, pane.scene.model
    scale = _drawn(pane, chart_of(model, pane.view, name), pane.rect.height)
    last = model.metric_series(name).last
    parts = [(f.short(last), Style.BOLD)] if math.isfinite(last) else []
    if scale is not None and scale.log:
        parts.append(("y:log", Style.DIM))
    pane.heading(clip_middle(name, max(4, pane.rect.width - 12)), *parts)


def _samples(number: int) -> str:
    return f.steps(number) if number < 1_000_000 else f.count(number)


def _trend(model: DashboardModel, q: int, width: int) -> str:
    """Return a quadrant's mean loss over the epochs, on one logarithmic scale for all quadrants."""
    logs = [[math.log(x) if 0 < x < math.inf else math.nan for x in losses] for losses in model.quadrant_losses]
    finite = [x for losses in logs for x in losses if math.isfinite(x)]
    if not finite:
        return ""
    return sparkline([losses[q] for losses in logs if q < len(losses)], width, min(finite), max(finite))


def _range(found: QuadrantsRefreshed, q: int) -> str:
    low, high = found.edges[q : q + 2]
    return f"{in_six(low):>6}–{in_six(high):<6}"[:13]


def _percent(share: float, unknown: str = "--") -> str:
    return f"{100 * share:3.0f}%" if math.isfinite(share) else unknown.rjust(4)


def difficulty_pane(pane: Pane) -> None:
    """Draw the quadrants as a table: six rows, two where the pane is short."""
    model = pane.scene.model
    found = model.quadrants
    if found is None:
        return
    pane.heading("difficulty", ("loss quartiles, Q4 is hardest", Style.DIM))
    draws = [n * uses for n, uses in zip(found.counts, found.uses, strict=False)]
    total = sum(draw for draw in draws if math.isfinite(draw)) or math.nan
    shares = [draw / total for draw in draws]
    known = min(len(found.counts), len(found.losses), len(found.edges) - 1)
    if pane.rect.height < 6:
        half = pane.rect.width // 2
        for q in range(min(4, known)):
            share = _percent(shares[q] if q < len(shares) else math.nan, "--%")
            text = f" {_range(found, q)} {_trend(model, q, 5):5} {share}"
            text += f"  stuck {f.count(found.stuck)}" if q == 3 and found.stuck else ""
            text = text if q % 2 else text[: max(0, half - 2)]
            pane.write(q // 2, (f"Q{q + 1}", _quarter_style(q)), (text, Style.NORMAL), indent=q % 2 * half)
        return
    pane.write(0, ("Q     loss range        n  draws       used×  easier  trend", Style.DIM))
    for q in range(min(known, len(shares), len(found.easier))):
        easier = _percent(found.easier[q] if q else math.nan, "-")
        line = (
            f"{_range(found, q)}{_samples(found.counts[q]):>7}  {bar(shares[q], 5, ' ')}"
            f" {_percent(shares[q])}  {f.brief(found.uses[q]):>5}    {easier}  {_trend(model, q, 6)}"
        )
        pane.write(1 + q, (f"Q{q + 1}  ", _quarter_style(q)), (line, Style.NORMAL))
    stuck = 100 * found.stuck / max(1, sum(found.counts))
    last = f"unseen {f.steps(found.unseen)}   stuck>5 epochs {f.steps(found.stuck)} ({stuck:.1f}%)"
    last += "   3 Enter: worst" if model.suspects else ""
    pane.write(5, (last, Style.WARN if found.stuck else Style.DIM))
    if pane.rect.height > 8 and model.suspects is not None:
        _worst_list(pane, model.suspects)


def _quarter_style(q: int) -> Style:
    return Style.WARN if q == 3 else Style.BOLD


def _worst_list(pane: Pane, found: SuspectsNamed) -> None:
    head = f"{f.steps(found.count)} suspects, likely wrong rather than hard; the worst first: sample, loss"
    pane.write(7, (head, Style.BOLD))
    rows = pane.rect.height - 8
    for i, (index, loss) in enumerate(zip(found.indices, found.losses, strict=False)):
        indent = i // rows * 24
        if indent + 22 > pane.rect.width:
            break
        text = f"{f.sample(index, 12):>12}  {f.number(loss, 8)}"
        pane.write(8 + i % rows, (text, Style.NORMAL), indent=indent)


def events_pane(pane: Pane) -> None:
    """Draw the newest events, the latest on top."""
    view, rows = pane.view, pane.rect.height
    hint = [(f"/{view.filter}{'_' * view.editing}", Style.WARN)] if view.filter or view.editing else []
    pane.heading("events", *hint, *pane.other_key)
    lines = [line for line in reversed(pane.scene.model.entries) if not view.filter or line.matches(view.filter)]
    start = min(view.scroll, max(0, len(lines) - rows)) if view.focus == 5 else 0
    shown = lines[start : start + rows] if start or view.filter else _pinned(lines, rows)
    if not lines:
        pane.write(0, ("nothing matches" if view.filter else "none yet", Style.DIM))
    for i, line in enumerate(shown):
        time = f.of_day(line.time, view.utc_offset, "%H:%M:%S" if pane.wide else "%H:%M")
        when = f"{time}  {f.steps(line.step):>10}  " if pane.wide else f"{time} {line.step:>8} "
        x = pane.write(i, (when, Style.DIM), (f"{line.icon} {line.kind:<11} ", line.style))
        pane.write(i, (clip(line.text, pane.rect.width - x), Style.NORMAL), indent=x)


def _pinned(lines: Sequence[Entry], rows: int) -> Sequence[Entry]:
    """Return the newest lines; the last faults keep up to half of the rows where routine would push them out."""
    newest = lines[:rows]
    missed = sum(line.icon in FAULTS for line in newest)
    older = [line for line in lines[rows:] if line.icon in FAULTS][: max(0, rows // 2 - missed)]
    return [*newest[: rows - len(older)], *older]


def console_pane(pane: Pane) -> None:
    """Draw the newest lines that the user's code printed, the latest at the bottom."""
    view, rows, width, lines = pane.view, pane.rect.height, pane.rect.width, pane.scene.lines
    hint = [(clip(view.console_title, max(8, width - 20)), Style.DIM)] if view.console_title else []
    pane.heading("console", *hint, *pane.other_key)
    if view.filter:
        needle = view.filter.casefold()
        lines = [line for line in lines if needle in line.casefold()]
    end = len(lines) - (min(view.scroll, max(0, len(lines) - rows)) if view.focus == 6 else 0)
    for i, line in enumerate(lines[max(0, end - rows) : end]):
        pane.write(i, (clip(line.replace("\t", "    "), width), Style.NORMAL))
