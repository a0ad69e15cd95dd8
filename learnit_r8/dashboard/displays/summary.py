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
    lines = [*_head(model), *_losses(model), *_safety(model), *_times(model, width), *_paths(model)]
    pages = [clip(line, width) for line in lines]
    for name in ("loss", _second(model)):
        pages += ["", *_chart(model, name, width, glyphs)]
    grid = Grid(width, len(pages), ascii_only=glyphs == "ascii")
    for y, line in enumerate(pages):
        grid.put(y, 0, line)
    return "\n".join(row.rstrip() for row in grid.rows())


def _row(name: str, text: str) -> str:
    return f"  {name:<{_LABEL}}{text}"


def _head(model: DashboardModel) -> list[str]:
    spent = model.elapsed(model.last_time) if model.last_time == model.last_time else 0.0
    of = f" of {f.steps(model.total_steps)}" if model.total_steps else ""
    epochs = f"/{model.num_epochs}" if model.num_epochs else ""
    reached = f"{f.steps(model.step)}{of} steps, epoch {model.epoch + 1}{epochs}, {f.span(spent)}"
    return [f"learnit::r8  {model.run or 'run'}  {state(model)}", _row("reached", reached)]


def _losses(model: DashboardModel) -> list[str]:
    loss = model.series["loss"]
    if loss.lo > loss.hi:
        return [_row("loss", "none reported")]
    text = f"last {f.brief(loss.last)}  ema {f.brief(loss.averages[0])}  min {f.brief(loss.lo)} at step "
    rows = [_row("loss", text + f"{f.steps(model.best_step)}  max {f.brief(loss.hi)}")]
    for metric in model.metrics.values():
        if is_part(metric.name):
            continue
        best = "" if metric.best is None else f"  best {f.brief(metric.best)} in epoch {metric.best_epoch + 1}"
        rows.append(_row(clip(metric.name, _LABEL - 1), f"last {f.brief(metric.last)}{best}"))
    return rows


def _safety(model: DashboardModel) -> list[str]:
    counts = f"{_many(model.spikes, 'spike')}, {_many(model.rollbacks, 'rollback')}, "
    counts += f"{model.nonfinite} losses not finite" if model.nonfinite != 1 else "1 loss not finite"
    rows = [_row("stability", counts + _held_back(model.quarantined))]
    if model.suspects is not None:
        rows.append(_row("suspects", f"{f.steps(model.suspects.count)} samples, likely wrong rather than hard"))
    rows += [_row("alarm", f"{line.kind}: {line.text}") for line in model.alarms.values()]
    return rows


def _many(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


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


def _paths(model: DashboardModel) -> list[str]:
    rows = [] if model.checkpoint is None else [_row("checkpoint", model.checkpoint.path)]
    folder = model.config.get("log_dir")
    return [*rows, _row("log", str(folder))] if folder else rows


def _second(model: DashboardModel) -> str:
    """The other chart: the first metric that was logged more than once, else the learning rate."""
    return next((name for name, metric in model.metrics.items() if metric.series.count > 1), "lr")


def _chart(model: DashboardModel, name: str, width: int, glyphs: str) -> list[str]:
    grid = Grid(width, _CHART_ROWS, ascii_only=glyphs == "ascii")
    scale = draw_chart(grid, 0, 0, width, _CHART_ROWS, chart_of(model, ViewState(), name), glyphs)
    if scale is None:
        return []
    return [f"  {name}{'  (log scale)' if scale.log else ''}", *grid.rows()]


def _held_back(samples: int) -> str:
    return f", {samples} sample{'' if samples == 1 else 's'} held back" if samples else ""
