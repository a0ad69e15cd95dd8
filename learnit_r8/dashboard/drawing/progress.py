"""The title line and the two progress bars."""

from __future__ import annotations

from learnit_r8.dashboard.drawing.cells import Grid, cell_width, clip
from learnit_r8.dashboard.drawing.glyphs import bar
from learnit_r8.dashboard.drawing.layout import WIDE
from learnit_r8.dashboard.keys import ViewState
from learnit_r8.run import formats as f
from learnit_r8.run.export import silent_for, state
from learnit_r8.run.metric import is_part, is_validation
from learnit_r8.run.model import DashboardModel
from learnit_r8.run.styles import Style

IDLE_SECONDS = 30.0
_STATES = {
    "running": ("● RUN", Style.GOOD),
    "waiting": ("○ WAIT", Style.DIM),
    "paused": ("○ PAUSED", Style.WARN),
    "finished": ("● DONE", Style.GOOD),
    "stopped": ("○ STOPPED", Style.WARN),
    "closed": ("○ CLOSED", Style.WARN),
    "error": ("○ ERROR", Style.BAD),
}


def status(model: DashboardModel, now: float) -> tuple[str, Style]:
    """Return the run's state as a word, with how long it has been silent where that is unusual."""
    name = state(model)
    if name == "running" and (silent := silent_for(model, now, IDLE_SECONDS)):
        return f"○ SILENT {f.span(silent)}", Style.WARN
    return _STATES.get(name, (f"○ {name.upper()}", Style.WARN))


def title(grid: Grid, model: DashboardModel, view: ViewState, now: float) -> None:
    """Write the title into the top border: who on the left, how on the right."""
    word, style = status(model, now)
    right = [(word, style), (f.stopwatch(model.elapsed(now)), Style.BOLD)]
    world = model.config.get("world_size")
    if isinstance(world, int) and world > 1:
        right.append((f"rank{model.config.get('rank', 0)}/{world}", Style.NORMAL))
    if view.frozen:
        right.insert(0, ("FROZEN", Style.WARN))
    if view.readonly:
        right.append(("read-only", Style.DIM))
    if view.hz is not None and grid.width >= WIDE:
        right.append((f"{view.hz:g}Hz", Style.DIM))
    room = sum(cell_width(text) for text, _ in right) + 2 * len(right)
    x = max(4, grid.width - room - 3)
    end = x
    x = grid.put(0, x, " ")
    for piece in right:
        x = grid.put_all(0, x, (piece, ("  ", Style.NORMAL)))
    grid.put(0, x - 1, "─", Style.DIM)
    left = [("learnit::r8" if grid.width >= WIDE else "r8", Style.TITLE)]
    for word, name, style in (("run", model.run, Style.BOLD), ("phase", model.phase, Style.ACCENT)):
        if name:
            left.append((f"{word} {name}" if grid.width >= WIDE else name, style))
    x = 2
    for i, (text, style) in enumerate(left):
        room = end - x - 4
        if room < 3:
            break
        border = [("─", Style.DIM)] if i else []
        x = grid.put_all(0, x, [*border, (" ", Style.NORMAL), (clip(text, room), style), (" ", Style.NORMAL)])


def _total_fields(model: DashboardModel, now: float, view: ViewState, wide: bool) -> tuple[str, list[str]]:
    """Return the run's position, and what is left as parts of falling importance."""
    if model.total_steps:
        total = f.steps(model.total_steps)
        position = f"{'step ' if wide else ''}{f.steps(model.step):>{len(total)}}/{total}"
    elif model.budget:
        position = f"{f.span(model.elapsed(now)):>6}/{f.span(model.budget)}"
        position += f"  step {f.steps(model.step)}" if wide else ""
    else:
        position = f"step {f.steps(model.step)}"
    if model.ended is not None:
        return position, [f"{model.ended.reason} after {f.span(model.ended.seconds)}"]
    eta = model.eta(now)
    if eta is None:
        return position, ["ETA --"]
    left, error = eta
    pattern = "%H:%M" if left < 43200 else "%a %H:%M" if left < 6 * 86400 else "%d %b"
    return position, [
        f"ETA {f.span(left)}",
        f" ±{f.rough(error)}" if error is not None and error >= 1 else "",
        f" (done ~{f.of_day(now + left, view.utc_offset, pattern)})",
    ]


def _epoch_fields(model: DashboardModel, now: float) -> tuple[list[str], list[str]]:
    """Return the epoch's position and what is left of it, both as parts of falling importance."""
    of = f"/{model.num_epochs}" if model.num_epochs else ""
    position = [f"ep {model.epoch + 1}{of}"]
    if model.epoch_batches:
        total = f.steps(model.epoch_batches)
        position.append(f"  {f.steps(model.epoch_step):>{len(total)}}/{total}")
    if model.ended is not None:
        return position, [""]
    eta = model.epoch_eta(now)
    parts = ["ETA --" if eta is None else f"ETA {f.span(eta)}", ""]
    if model.pace.validation.count and model.pace.validation.mean >= 0.5:
        parts.append(f" · val {f.span(model.pace.validation.mean)}/epoch counted")
    return position, parts


def progress(grid: Grid, y: int, x: int, width: int, model: DashboardModel, view: ViewState, now: float) -> None:
    """Draw the bars of the run and of the epoch, their columns aligned; narrow screens show fewer parts."""
    wide = grid.width >= WIDE
    position, left = _total_fields(model, now, view, wide)
    epoch_position, epoch_left = _epoch_fields(model, now)
    speed, count = model.pace.step_seconds, model.series["loss"].count
    rate = ""
    if wide and speed > 0 and count and model.ended is None:
        rate = f"{f.short(model.samples / count / speed)} smp/s".rjust(11)
    for most, epoch_parts, rate_text in ((3, 2, rate), (3, 2, ""), (2, 2, ""), (2, 1, ""), (1, 1, "")):
        where = (position, "".join(epoch_position[:epoch_parts]))
        rest = ("".join(left[:most]), "".join(epoch_left[:most]))
        positions = max(len(where[0]), len(where[1]), 18 if wide else 13)
        # The least widths keep the bars from moving when a number gains a digit.
        lefts = max(len(rest[0]), len(rest[1]), 34 if wide and most == 3 else 14 if most > 1 else 10)
        cells = width - (17 + positions + lefts + len(rate_text))
        if cells >= 16:
            break
    of_epoch = model.epoch_step / model.epoch_batches if model.epoch_batches else None
    for row, (name, share) in enumerate((("TOTAL", model.progress(now)), ("EPOCH", of_epoch))):
        drawn = bar(share or 0.0, max(4, cells))
        filled = len(drawn.rstrip("─"))
        text = where[row].ljust(positions) + "  " + rest[row].ljust(lefts) + ("" if row else rate_text)
        done = "   --%" if share is None else f"{100 * share:5.1f}%"
        parts = [(f"{name} ", Style.BOLD), (drawn[:filled], Style.ACCENT), (drawn[filled:], Style.DIM)]
        grid.put_all(y + row, x, [*parts, (f" {done}  ", Style.BOLD), (text, Style.NORMAL)], x + width)


def bare_lines(model: DashboardModel, now: float) -> list[list[str]]:
    """Return the small modes' lines as fields, the most important first."""
    share = model.progress(now)
    word, _ = status(model, now)
    eta = model.eta(now)
    total = f"/{model.total_steps}" if model.total_steps else ""
    of = f"/{model.num_epochs}" if model.num_epochs else ""
    first = [
        f"R8 {word[0]}" if word.endswith("RUN") else f"R8 {word}",
        f"{100 * share:.1f}%" if share is not None else f"{model.step}",
        f"ep{model.epoch + 1}{of}",
        f"{model.step}{total}",
    ]
    if model.ended is None:
        first.append("ETA --" if eta is None else f"ETA {f.span(eta[0])}")
    loss = model.series["loss"]
    second = [f"loss {f.short(model.loss)}", f"ema {f.short(loss.averages[0])}", f"lr {f.short(model.lr)}"]
    second += [
        f"{_short_name(name)} {f.short(metric.last)}"
        for name, metric in sorted(model.metrics.items(), key=_validation_first)
        if not is_part(name)
    ]
    if not loss.count:
        second = ["waiting for the first loss"]
    third = [f"!{model.spikes} R{model.rollbacks}" + (f" nan {model.nonfinite}" if model.nonfinite else "")]
    if model.entries:
        last = model.entries[-1]
        third += [f"last: {last.icon} {last.kind} {f.rough(max(0.0, now - last.time))} ago"]
    return [first, second, third]


def _validation_first(item: tuple[str, object]) -> bool:
    return not is_validation(item[0])


def _short_name(name: str) -> str:
    return {"val_loss": "val", "grad_norm": "grad", "val_acc": "acc"}.get(name, name)
