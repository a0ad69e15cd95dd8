"""After a run: its numbers and two small charts as plain text."""

from __future__ import annotations

import math

from learnit_r8.dashboard.drawing.cells import Grid, clip
from learnit_r8.dashboard.drawing.charts import draw_chart
from learnit_r8.dashboard.drawing.glyphs import bar
from learnit_r8.dashboard.drawing.panels import chart_of
from learnit_r8.dashboard.keys import ViewState
from learnit_r8.run import formats as f
from learnit_r8.run.export import state
from learnit_r8.run.metric import is_part
from learnit_r8.run.model import DashboardModel

_CHART_ROWS = 9
_LABEL = 12


def summary_text(model: DashboardModel, width: int = 80, glyphs: str = "braille") -> str:
    """Return the summary of a run as text of `width` cells (at least 40) at most; with "ascii" all of it is ASCII."""
    width = max(40, width)
    rows = [*_losses(model), *_safety(model)]
    lines = [f"learnit::r8  {model.run or 'run'}  {state(model)}", _row("reached", _reached(model))]
    lines += [*(_row(name, text) for name, text in rows), *_times(model, width)]
    if model.checkpoint is not None:
        lines.append(_row("checkpoint", model.checkpoint.path))
    if folder := model.config.get("log_dir"):
        lines.append(_row("log", str(folder)))
    pages = [clip(line, width) for line in lines]
    # Beside the loss the first metric that was logged more than once, else the learning rate.
    for name in ("loss", next((name for name, metric in model.metrics.items() if metric.series.count > 1), "lr")):
        chart = Grid(width, _CHART_ROWS, ascii_only=glyphs == "ascii")
        scale = draw_chart(chart, 0, 0, width, _CHART_ROWS, chart_of(model, ViewState(), name), glyphs)
        pages.append("")
        if scale is not None:
            pages += [f"  {name}{'  (log scale)' if scale.log else ''}", *chart.rows()]
    grid = Grid(width, len(pages), ascii_only=glyphs == "ascii")
    for y, line in enumerate(pages):
        grid.put(y, 0, line)
    return "\n".join(row.rstrip() for row in grid.rows())


def _row(name: str, text: str) -> str:
    return f"  {name:<{_LABEL}}{text}"


def _reached(model: DashboardModel) -> str:
    spent = model.elapsed(model.last_time) if model.last_time == model.last_time else 0.0
    of = f" of {f.steps(model.total_steps)}" if model.total_steps else ""
    epochs = f"/{model.num_epochs}" if model.num_epochs else ""
    return f"{f.steps(model.step)}{of} steps, epoch {model.epoch + 1}{epochs}, {f.span(spent)}"


def _losses(model: DashboardModel) -> list[tuple[str, str]]:
    loss = model.series["loss"]
    if loss.lo > loss.hi:
        return [("loss", "none reported")]
    text = f"last {f.brief(loss.last)}  ema {f.brief(loss.averages[0])}  min {f.brief(loss.lo)} at step "
    rows = [("loss", text + f"{f.steps(model.best_step)}  max {f.brief(loss.hi)}")]
    for metric in model.metrics.values():
        if is_part(metric.name):
            continue
        best = "" if metric.best is None else f"  best {f.brief(metric.best)} in epoch {metric.best_epoch + 1}"
        rows.append((clip(metric.name, _LABEL - 1), f"last {f.brief(metric.last)}{best}"))
    return rows


def _many(number: int, what: str, what_many: str = "") -> str:
    return f"{number} {what if number == 1 else what_many or f'{what}s'}"


def _safety(model: DashboardModel) -> list[tuple[str, str]]:
    counts = [_many(model.spikes, "spike"), _many(model.rollbacks, "rollback")]
    counts.append(_many(model.nonfinite, "loss not finite", "losses not finite"))
    if model.quarantined:
        counts.append(f"{_many(model.quarantined, 'sample')} held back")
    rows = [("stability", ", ".join(counts))]
    if model.suspects is not None:
        rows.append(("suspects", f"{f.steps(model.suspects.count)} samples, likely wrong rather than hard"))
    return rows + [("alarm", f"{line.kind}: {line.text}") for line in model.alarms.values()]


def _times(model: DashboardModel, width: int) -> list[str]:
    """Where the time of this process went, as bars."""
    spent = {name: seconds for name, seconds in model.pace.spent.items() if seconds > 0}
    total = sum(spent.values())
    if not 0 < total < math.inf:
        return []
    cells = max(8, min(30, width - 40))
    return ["  where the time went"] + [
        f"    {name:<15}{f.span(seconds):>8} {100 * seconds / total:5.1f}%  {bar(seconds / total, cells, ' ')}".rstrip()
        for name, seconds in spent.items()
    ]
