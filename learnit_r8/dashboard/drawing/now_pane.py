"""The numbers of the moment, most important first, and the settings; what a run does not have takes no row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from learnit_r8.dashboard.drawing.cells import Grid, clip, clip_middle
from learnit_r8.dashboard.drawing.glyphs import sparkline
from learnit_r8.dashboard.drawing.layout import Rect
from learnit_r8.dashboard.drawing.panels import Piece, heading, write
from learnit_r8.dashboard.keys import ViewState
from learnit_r8.dashboard.meters import Gpu
from learnit_r8.run import formats as f
from learnit_r8.run.metric import GRADIENT, Metric, is_part, is_validation
from learnit_r8.run.model import DashboardModel
from learnit_r8.run.styles import Style

_LABEL, _SETTING = 10, 12
HOT = 85
"""Degrees Celsius from which a GPU's temperature stands out: most throttle a little above."""
FAR = 3.0
"""Standard deviations from which a loss stands out."""
_HIGH = 3.0
"""Times its average from which the norm of a part's gradient stands out."""
_SETTINGS = (
    ("strategy", "strategy"), ("batch", "batch_size"), ("samples", "num_samples"), ("epochs", "num_epochs"),
    ("seconds", "train_duration_seconds"), ("peak lr", "initial_lr"), ("schedule", "scheduler_mode"),
    ("warm-up", "warmup_proportion"), ("min lr", "min_lr"), ("backup each", "backup_every"),
    ("ckpt each", "checkpoint_every"), ("checkpoints", "checkpoint_dir"), ("log", "log_dir"), ("guard", "noise_guard"),
    ("seed", "seed"), ("ranks", "world_size"),
)  # fmt: skip
_WAITING = "waiting for the first loss"


def _row(name: str, *parts: Piece) -> list[Piece]:
    return [(name.ljust(_LABEL), Style.DIM), *parts]


def _fields(*texts: str) -> Piece:
    return "  ".join(texts), Style.NORMAL


def _loss(model: DashboardModel) -> list[Piece]:
    series = model.series["loss"]
    ema = series.averages[0]
    best = series.lo if series.lo < math.inf else math.nan
    # Half of all losses lie above their average: only one that is far off is worth a colour.
    far = abs(model.loss - ema) > FAR * model.sigma > 0
    arrow, style = ("▲", Style.WARN if far else Style.DIM) if model.loss > ema else ("▼", Style.DIM)
    if not math.isfinite(model.loss):
        arrow, style = "×", Style.BAD
    rest = _fields(f" ema {_six(ema)}", f"min {f.brief(best)}")
    return _row("loss", (f.number(model.loss, 8), Style.BOLD), (f" {arrow}", style), rest)


def _six(value: float) -> str:
    """Return a number in six characters: one that is cut off would lose its exponent."""
    text = f.number(value)
    return (text if len(text) <= 6 else f.short(value)).rjust(6)


def _surprise(model: DashboardModel) -> list[Piece]:
    surprise = model.loss - model.expected_loss
    return _row(
        "δsurp",
        _fields(
            f.signed(surprise, 8) if math.isfinite(surprise) else f"{'--':>8}",
            f" σ   {f.number(model.sigma, 6)}",
            f"z {model.score:+.1f}" if math.isfinite(model.score) else "z --",
        ),
    )


def _lr(model: DashboardModel) -> list[Piece]:
    values = model.series["lr"].values(9)
    mode = model.config.get("scheduler_mode", "")
    name = f" {clip(mode, 11)}" if isinstance(mode, str) and mode else ""
    return _row(
        "lr", (f"{model.lr:8.2e}", Style.BOLD), (f"  {name:<12}  ", Style.NORMAL), (sparkline(values, 9), Style.ACCENT)
    )


def _steps(model: DashboardModel, view: ViewState) -> list[list[Piece]]:
    if not model.recent_steps:
        return []
    ordered = sorted(model.recent_steps)
    p50, p99 = ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    rows = [
        _row(
            "step",
            (f"{f.milliseconds(p50):>8}", Style.BOLD),
            _fields("", f" p99 {f.milliseconds(p99)}", f"max {f.milliseconds(ordered[-1])}"),
        )
    ]
    spent, steps = model.pace.spent, max(1, model.pace.steps)
    shares = [
        f"{name} {_ms(spent[key] / steps)}"
        for name, key in (("user", "user step"), ("r8", "r8 overhead"), ("between", "between steps"))
    ]
    if view.ui_share is not None:
        shares.append(f"ui {_ms(view.ui_share * model.pace.step_seconds)}")
    return [*rows, [("└ms ", Style.DIM), _fields(*shares)]]


def _ms(seconds: float) -> str:
    value = seconds * 1000
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.095 else f"{value:.2f}"


def _metric(metric: Metric) -> list[Piece]:
    parts = [(f.number(metric.last, 8), Style.BOLD)]
    validation = is_validation(metric.name)
    if validation:
        parts.append((f" @ep{metric.last_epoch + 1}", Style.DIM))
    if metric.best is not None and validation:
        word = "best" if not metric.is_best else "best, now"
        parts.append(
            _fields(
                "", f"{word} {f.number(metric.best)} @ep{metric.best_epoch + 1}" if not metric.is_best else "● best"
            )
        )
    elif not validation and metric.series.count > 1:
        parts.append(_fields("", f" min {f.number(metric.series.lo, 6)}", f"max {f.number(metric.series.hi)}"))
    return _row(clip_middle(metric.name, _LABEL - 1), *parts)


def _metrics(model: DashboardModel, width: int) -> list[list[Piece]]:
    """Return a row for each number; the parts of the gradient's norm come together, after the whole."""
    rows = []
    for metric in _ordered(model):
        rows.append(_metric(metric))
        if metric.name == GRADIENT:
            rows += _parts(model, width)
    return rows


def _parts(model: DashboardModel, width: int) -> list[list[Piece]]:
    """Return the norms of the model's parts in as few rows as there may be; one far above its average stands out."""
    rows: list[list[Piece]] = []
    left = 0
    for metric in model.metrics.values():
        if not is_part(metric.name):
            continue
        text = f"{clip_middle(metric.name.partition('/')[2], _LABEL)} {f.short(metric.last)}"
        if left < len(text):
            rows.append([("└ " if not rows else "  ", Style.DIM)])
            left = width - 2
        usual = metric.series.averages[0]
        rows[-1].append((f"{text}  ", Style.WARN if not metric.last <= _HIGH * usual else Style.NORMAL))
        left -= len(text) + 2
    return rows


def _gpu(gpu: Gpu) -> list[Piece]:
    style = Style.BAD if gpu.celsius >= HOT else Style.NORMAL
    memory = f"  {gpu.used / 2**30:.1f}/{gpu.total / 2**30:.1f}G"
    return _row(
        f"gpu{gpu.number}", (f"{gpu.busy:8.0%}", Style.BOLD), (f"  {gpu.celsius}°C", style), (memory, Style.NORMAL)
    )


def _safety(model: DashboardModel, now: float, width: int) -> list[list[Piece]]:
    places = []
    if model.backup_step is not None:
        places.append(f"RAM backup {f.steps(max(0, model.step - 1 - model.backup_step))} steps ago")
    if model.checkpoint is not None:
        places.append(f"ckpt {f.rough(max(0.0, now - model.checkpoint.time))} ago")
    rows = [[("   ".join(places), Style.NORMAL)]] if places else []
    bad = Style.WARN if model.spikes or model.nonfinite else Style.NORMAL
    rows.append([(f"spikes {model.spikes}   rollbacks {model.rollbacks}   nan {model.nonfinite}", bad)])
    if model.quarantined:
        rows[-1].append((f"   held {model.quarantined}", Style.WARN))
    if model.alarms:
        last = list(model.alarms.values())[-1]
        more = f" (+{len(model.alarms) - 1})" if len(model.alarms) > 1 else ""
        rows.append([(clip(f"alarm{more} {last.kind}: {last.text}", width), Style.BAD)])
    else:
        rows.append([("alarms none", Style.DIM)])
    return rows


def now_pane(grid: Grid, rect: Rect, model: DashboardModel, view: ViewState, now: float) -> None:
    """Draw the numbers as one column of rows."""
    heading(grid, rect, 2, "now", view)
    if not model.series["loss"].count:
        write(grid, rect, 0, (_WAITING, Style.DIM))
        return
    metrics = [*_metrics(model, rect.width), *map(_gpu, view.gpus)]
    safety = _safety(model, now, rect.width)
    steps = _steps(model, view)
    fixed = [_loss(model), _surprise(model), _lr(model)]
    # The last rows stay where they are: metrics fill what lies between, and give way first.
    room = max(0, rect.height - len(fixed) - len(safety) - len(steps))
    if len(metrics) > room and room + 1 <= len(metrics) and len(steps) == 2 and room < 2:
        steps, room = steps[:1], room + 1
    rows = [*fixed, *metrics[:room], *steps, *safety]
    if len(metrics) > room:
        more = f"+{len(metrics) - room} more: 2 Enter"
        grid.put(rect.y, max(rect.x, rect.x + rect.width - len(more) - 2), f" {more} ", Style.BOLD)
    if len(rows) > rect.height:
        rows = [fixed[0], safety[-2], fixed[2], *([safety[-1]] if model.alarms else []), *metrics, *steps, fixed[1]]
    for i, row in enumerate(rows[: rect.height]):
        write(grid, rect, i, *row)


def _ordered(model: DashboardModel) -> list[Metric]:
    """Validation first, then the others, each in the order of their first report; without parts of a norm."""
    shown = [metric for metric in model.metrics.values() if not is_part(metric.name)]
    return sorted(shown, key=lambda metric: not is_validation(metric.name))


def short_now_pane(grid: Grid, rect: Rect, model: DashboardModel, view: ViewState, now: float) -> None:
    """Draw the numbers as two lines."""
    heading(grid, rect, 2, "now", view)
    if not model.series["loss"].count:
        write(grid, rect, 0, (_WAITING, Style.DIM))
        return
    loss = model.series["loss"]
    arrow = "▲" if model.loss > loss.averages[0] else "▼"
    first = [f"loss {f.short(model.loss)} {arrow} ema {f.short(loss.averages[0])}", f"lr {model.lr:.2e}"]
    first += [
        f"{clip_middle(metric.name, 10)} {f.short(metric.last)}"
        + (f"@{metric.last_epoch + 1}" if is_validation(metric.name) else "")
        for metric in _ordered(model)[:2]
    ]
    first.append(f"{f.milliseconds(model.pace.step_seconds)}/step")
    second = [f"spikes {model.spikes}", f"rollbacks {model.rollbacks}", f"nan {model.nonfinite}"]
    if model.backup_step is not None:
        second.append(f"backup {max(0, model.step - 1 - model.backup_step)} steps ago")
    if model.checkpoint is not None:
        second.append(f"ckpt {f.rough(max(0.0, now - model.checkpoint.time))} ago")
    if view.gpus:
        gpu = view.gpus[0]
        second.insert(0, f"gpu {gpu.busy:.0%} {gpu.celsius}°C {gpu.used / 2**30:.1f}/{gpu.total / 2**30:.0f}G")
    if model.alarms:
        second.insert(0, f"alarm: {list(model.alarms.values())[-1].kind}")
    for row, fields in enumerate((first, second)):
        while fields and len("  ".join(fields)) > rect.width:
            fields.pop()
        write(grid, rect, row, _fields(*fields))


def metrics_table(grid: Grid, rect: Rect, model: DashboardModel, view: ViewState) -> None:
    """Draw every number that the run reports, with its extremes and course: the zoomed pane."""
    heading(grid, rect, 2, "all numbers", view)
    cells = max(0, min(60, rect.width - 62))
    write(grid, rect, 0, (f"{'':20}{'last':>9}{'min':>10}{'max':>10}{'points':>9}  course", Style.DIM))
    for i, name in enumerate(model.metric_names()[view.scroll :][: rect.height - 1]):
        series = model.metric_series(name)
        low, high = (series.lo, series.hi) if series.lo <= series.hi else (math.nan, math.nan)
        text = f"{f.number(series.last, 9)}{f.number(low, 10)}{f.number(high, 10)}{f.count(series.count):>9}  "
        course = sparkline(series.values(cells), cells)
        shown = clip_middle(name, 19).ljust(20)
        write(grid, rect, i + 1, (shown, Style.BOLD), (text, Style.NORMAL), (course, Style.ACCENT))


def settings(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return a run's settings as (label, text), those that are not set left out."""
    found = []
    for label, name in _SETTINGS:
        value = config.get(name)
        if value is None or value == "":
            continue
        if isinstance(value, float):
            text = f.brief(value)
        elif isinstance(value, int) and not isinstance(value, bool) and name != "seed":
            text = f.steps(value)
        else:
            text = str(value)
        found.append((label, text))
    return found


def run_pane(grid: Grid, rect: Rect, model: DashboardModel, view: ViewState) -> None:
    """Draw the machine's load, then the settings."""
    heading(grid, rect, 0, "run", view, [(f"pid {model.pid}", Style.DIM)] if model.pid else [])
    rows = [*view.host, *settings(model.config)]
    for i, (label, text) in enumerate(rows[: rect.height]):
        shown = clip_middle(text, rect.width - _SETTING)
        write(grid, rect, i, (f"{label:<{_SETTING}}", Style.DIM), (shown, Style.NORMAL))
