"""The numbers of the moment, most important first, and the settings; what a run does not have takes no row."""

from __future__ import annotations

import math
from typing import Any

from learnit_r8.dashboard.drawing.cells import clip, clip_middle
from learnit_r8.dashboard.drawing.glyphs import sparkline
from learnit_r8.dashboard.drawing.layout import Pane, Piece
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
    average = f.number(ema)  # in six characters: one that is cut off would lose its exponent
    average = average if len(average) <= 6 else f.short(ema)
    rest = _fields(f" ema {average:>6}", f"min {f.brief(best)}")
    return _row("loss", (f.number(model.loss, 8), Style.BOLD), (f" {arrow}", style), rest)


def _surprise(model: DashboardModel) -> list[Piece]:
    surprise = model.loss - model.expected_loss
    off = f.signed(surprise, 8) if math.isfinite(surprise) else f"{'--':>8}"
    z = f"z {model.score:+.1f}" if math.isfinite(model.score) else "z --"
    return _row("δsurp", _fields(off, f" σ   {f.number(model.sigma, 6)}", z))


def _lr(model: DashboardModel) -> list[Piece]:
    mode = model.config.get("scheduler_mode", "")
    name = f" {clip(mode, 11)}" if isinstance(mode, str) and mode else ""
    course = sparkline(model.series["lr"].values(9), 9)
    return _row("lr", (f"{model.lr:8.2e}", Style.BOLD), (f"  {name:<12}  ", Style.NORMAL), (course, Style.ACCENT))


def _steps(model: DashboardModel, view: ViewState) -> list[list[Piece]]:
    if not model.recent_steps:
        return []
    ordered = sorted(model.recent_steps)
    p50, p99 = ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    others = _fields("", f" p99 {f.milliseconds(p99)}", f"max {f.milliseconds(ordered[-1])}")
    spent, steps = model.pace.spent, max(1, model.pace.steps)
    shares = [("user", spent["user step"] / steps), ("r8", spent["r8 overhead"] / steps)]
    shares.append(("between", spent["between steps"] / steps))
    if view.ui_share is not None:
        shares.append(("ui", view.ui_share * model.pace.step_seconds))
    parts = _fields(*(f"{name} {_ms(1000 * seconds)}" for name, seconds in shares))
    return [_row("step", (f"{f.milliseconds(p50):>8}", Style.BOLD), others), [("└ms ", Style.DIM), parts]]


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.095 else f"{value:.2f}"


def _metric(metric: Metric) -> list[Piece]:
    parts = [(f.number(metric.last, 8), Style.BOLD)]
    if is_validation(metric.name):
        parts.append((f" @ep{metric.last_epoch + 1}", Style.DIM))
        if metric.best is not None:
            best = f"best {f.number(metric.best)} @ep{metric.best_epoch + 1}"
            parts.append(_fields("", "● best" if metric.is_best else best))
    elif metric.series.count > 1:
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
    hot = Style.BAD if gpu.celsius >= HOT else Style.NORMAL
    memory = (f"  {gpu.used / 2**30:.1f}/{gpu.total / 2**30:.1f}G", Style.NORMAL)
    return _row(f"gpu{gpu.number}", (f"{gpu.busy:8.0%}", Style.BOLD), (f"  {gpu.celsius}°C", hot), memory)


def _safety(model: DashboardModel, now: float, width: int) -> list[list[Piece]]:
    places = _places(model, now, "RAM backup")
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


def _places(model: DashboardModel, now: float, backup: str) -> list[str]:
    """Return how old the newest backup and checkpoint are."""
    places = []
    if model.backup_step is not None:
        places.append(f"{backup} {f.steps(max(0, model.step - 1 - model.backup_step))} steps ago")
    if model.checkpoint is not None:
        places.append(f"ckpt {f.rough(max(0.0, now - model.checkpoint.time))} ago")
    return places


def now_pane(pane: Pane) -> None:
    """Draw the numbers as one column of rows, as two lines where that has no room, and all of them where zoomed."""
    if pane.view.zoomed and pane.view.focus == 2:
        _metrics_table(pane)
        return
    pane.heading("now")
    if not pane.scene.model.series["loss"].count:
        pane.write(0, ("waiting for the first loss", Style.DIM))
    elif pane.wide:
        _column(pane)
    else:
        _two_lines(pane)


def _column(pane: Pane) -> None:
    rect, model, view = pane.rect, pane.scene.model, pane.view
    metrics = [*_metrics(model, rect.width), *map(_gpu, view.gpus)]
    safety = _safety(model, pane.now, rect.width)
    steps = _steps(model, view)
    fixed = [_loss(model), _surprise(model), _lr(model)]
    # The last rows stay where they are: metrics fill what lies between, and give way first.
    room = max(0, rect.height - len(fixed) - len(safety) - len(steps))
    if len(metrics) > room and len(steps) == 2 and room < 2:
        steps, room = steps[:1], room + 1
    rows = [*fixed, *metrics[:room], *steps, *safety]
    if len(metrics) > room:
        more = f"+{len(metrics) - room} more: 2 Enter"
        pane.grid.put(rect.y, max(rect.x, rect.x + rect.width - len(more) - 2), f" {more} ", Style.BOLD)
    if len(rows) > rect.height:
        rows = [fixed[0], safety[-2], fixed[2], *([safety[-1]] if model.alarms else []), *metrics, *steps, fixed[1]]
    for i, row in enumerate(rows[: rect.height]):
        pane.write(i, *row)


def _ordered(model: DashboardModel) -> list[Metric]:
    """Validation first, then the others, each in the order of their first report; without parts of a norm."""
    shown = [metric for metric in model.metrics.values() if not is_part(metric.name)]
    return sorted(shown, key=lambda metric: not is_validation(metric.name))


def _two_lines(pane: Pane) -> None:
    model, loss = pane.scene.model, pane.scene.model.series["loss"]
    arrow = "▲" if model.loss > loss.averages[0] else "▼"
    first = [f"loss {f.short(model.loss)} {arrow} ema {f.short(loss.averages[0])}", f"lr {model.lr:.2e}"]
    for metric in _ordered(model)[:2]:
        epoch = f"@{metric.last_epoch + 1}" if is_validation(metric.name) else ""
        first.append(f"{clip_middle(metric.name, 10)} {f.short(metric.last)}{epoch}")
    first.append(f"{f.milliseconds(model.pace.step_seconds)}/step")
    second = [f"alarm: {alarm.kind}" for alarm in list(model.alarms.values())[-1:]]
    if pane.view.gpus:
        gpu = pane.view.gpus[0]
        second.append(f"gpu {gpu.busy:.0%} {gpu.celsius}°C {gpu.used / 2**30:.1f}/{gpu.total / 2**30:.0f}G")
    second += [f"spikes {model.spikes}", f"rollbacks {model.rollbacks}", f"nan {model.nonfinite}"]
    second += _places(model, pane.now, "backup")
    for row, fields in enumerate((first, second)):
        while fields and len("  ".join(fields)) > pane.rect.width:
            fields.pop()
        pane.write(row, _fields(*fields))


def _metrics_table(pane: Pane) -> None:
    """Draw every number that the run reports, with its extremes and course."""
    model = pane.scene.model
    pane.heading("all numbers")
    cells = max(0, min(60, pane.rect.width - 62))
    pane.write(0, (f"{'':20}{'last':>9}{'min':>10}{'max':>10}{'points':>9}  course", Style.DIM))
    for i, name in enumerate(model.metric_names()[pane.view.scroll :][: pane.rect.height - 1]):
        series = model.metric_series(name)
        low, high = (series.lo, series.hi) if series.lo <= series.hi else (math.nan, math.nan)
        text = f"{f.number(series.last, 9)}{f.number(low, 10)}{f.number(high, 10)}{f.count(series.count):>9}  "
        course = sparkline(series.values(cells), cells)
        shown = clip_middle(name, 19).ljust(20)
        pane.write(i + 1, (shown, Style.BOLD), (text, Style.NORMAL), (course, Style.ACCENT))


def _setting(name: str, value: Any) -> str:
    if isinstance(value, float):
        return f.brief(value)
    return f.steps(value) if type(value) is int and name != "seed" else str(value)


def run_pane(pane: Pane) -> None:
    """Draw the machine's load, then the settings; those that are not set are left out."""
    model = pane.scene.model
    pane.heading("run", *([(f"pid {model.pid}", Style.DIM)] if model.pid else []))
    given = [(label, name, model.config.get(name)) for label, name in _SETTINGS]
    settings = [(label, _setting(name, value)) for label, name, value in given if value is not None and value != ""]
    for i, (label, text) in enumerate([*pane.view.host, *settings][: pane.rect.height]):
        shown = clip_middle(text, pane.rect.width - _SETTING)
        pane.write(i, (f"{label:<{_SETTING}}", Style.DIM), (shown, Style.NORMAL))
