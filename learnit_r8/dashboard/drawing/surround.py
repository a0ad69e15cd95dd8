"""What surrounds the panes: title, progress bars, keys, what lies over the screen; and the lines of small windows."""

from __future__ import annotations

from learnit_r8.dashboard.drawing.cells import Grid, cell_width, clip
from learnit_r8.dashboard.drawing.glyphs import bar
from learnit_r8.dashboard.drawing.layout import MIN_HEIGHT, MIN_WIDTH, WIDE
from learnit_r8.dashboard.keys import ViewState
from learnit_r8.run import formats as f
from learnit_r8.run.export import silent_for, state
from learnit_r8.run.metric import is_part, is_validation
from learnit_r8.run.model import DashboardModel
from learnit_r8.run.styles import Style

IDLE_SECONDS = 30.0
GLYPH_HINT_SECONDS = 10.0
_KEYS = (
    ("q", "close this view (Ctrl-Z, fg: back)"),
    ("s", "stop after the step, the epoch, or at once"),
    ("c", "write a checkpoint"),
    ("p", "pause, and go on"),
    ("1-6 Tab", "focus a pane"),
    ("Enter Esc", "zoom the pane in focus, and back"),
    ("← →", "other metric"),
    ("↑ ↓ PgUp PgDn", "scroll the pane in focus"),
    ("y  x", "y axis: log, linear; x: step, time, epoch"),
    ("z", "smoothing: to fit, .9, .98, .995, none"),
    ("+ -", "shorter and longer window"),
    ("/  f", "filter events and console; freeze the picture"),
    ("g  ^L", "glyphs: braille, blocks, ASCII; repaint"),
    ("?", "next page: what the words mean"),
)
_NUMBERS = (
    ("ema", "moving average of the loss over some 50 steps"),
    ("δsurp", "surprise: loss less what the batch promised"),
    ("σ", "usual distance of the loss from its ema"),
    ("z", "how many σ the last loss was off"),
    ("lr", "learning rate, its schedule, its course"),
    ("step p99 max", "a step: median, 99% below, longest of 512"),
    ("└ms", "of it: your code, r8, between, this view"),
    ("@ep  best", "epochs of the last and the best value"),
    ("RAM backup", "the model that a rollback would restore"),
    ("held", "samples kept out: faults name them often"),
    ("alarms", "what needs a look"),
    ("ETA ±", "time left, validation counted; its spread"),
    ("phase", "what the run does: cataloging, LR search.."),
    ("ckpt", "checkpoint on disk"),
)
_SIGNS = (
    ("━  ░", "the smoothed line; lowest to highest loss"),
    ("▲ ▼ ×", "beyond the axis, with its value; × not finite"),
    ("●", "validation"),
    ("! R X", "spike, rollback, failure: always shown"),
    ("C V P L", "checkpoint, validation, phase, lr found"),
    ("Q1..Q4", "quarters of the samples by loss; Q4 is hardest"),
    ("draws", "share of all draws that the quarter gets"),
    ("used×", "how often a sample of it was drawn"),
    ("easier", "share that became easier in the last epoch"),
    ("trend", "its mean loss, epoch by epoch"),
    ("unseen", "samples never drawn yet"),
    ("stuck>5", "long in Q4: hard, or labelled wrong"),
    ("suspects", "samples likely wrong rather than hard"),
    ("ui  Hz", "cost of this view a step; frames a second"),
)
_PAGES: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("keys", _KEYS),
    ("numbers", _NUMBERS),
    ("signs", _SIGNS),
)
_CONFIRM: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "stop": (
        "stop training?",
        (
            ("step", "and Enter: after this step"),
            ("epoch", "and Enter: after this epoch, with a checkpoint"),
            ("abort", "and Enter: now, as Ctrl-C does"),
            ("Esc", "go on training"),
        ),
    ),
    "pause": ("pause training?", (("pause", "and Enter: wait until p is pressed"), ("Esc", "go on training"))),
}
_STATES = {
    "running": ("● RUN", Style.GOOD),
    "waiting": ("○ WAIT", Style.DIM),
    "finished": ("● DONE", Style.GOOD),
    "error": ("○ ERROR", Style.BAD),
}
_SHORT = {"val_loss": "val", "grad_norm": "grad", "val_acc": "acc"}


def status(model: DashboardModel, now: float) -> tuple[str, Style]:
    """Return the run's state as a word, with how long it has been silent where that is unusual."""
    name = state(model)
    if name == "running" and (silent := silent_for(model, now, IDLE_SECONDS)):
        return f"○ SILENT {f.span(silent)}", Style.WARN
    return _STATES.get(name, (f"○ {name.upper()}", Style.WARN))


def title(grid: Grid, model: DashboardModel, view: ViewState, now: float) -> None:
    """Write the title into the top border: who on the left, how on the right."""
    world = model.config.get("world_size")
    right = [
        ("FROZEN" * view.frozen, Style.WARN),
        status(model, now),
        (f.stopwatch(model.elapsed(now)), Style.BOLD),
        (f"rank{model.config.get('rank', 0)}/{world}" if isinstance(world, int) and world > 1 else "", Style.NORMAL),
        ("read-only" * view.readonly, Style.DIM),
        (f"{view.hz:g}Hz" if view.hz is not None and grid.width >= WIDE else "", Style.DIM),
    ]
    right = [piece for piece in right if piece[0]]
    end = max(4, grid.width - sum(cell_width(text) + 2 for text, _ in right) - 3)
    x = grid.put(0, end, " ")
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
    step = f.steps(model.step)
    if model.total_steps:
        total = f.steps(model.total_steps)
        position = f"{'step ' * wide}{step:>{len(total)}}/{total}"
    elif model.budget:
        position = f"{f.span(model.elapsed(now)):>6}/{f.span(model.budget)}" + f"  step {step}" * wide
    else:
        position = f"step {step}"
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


def _of_epochs(model: DashboardModel) -> str:
    return f"/{model.num_epochs}" if model.num_epochs else ""


def _epoch_fields(model: DashboardModel, now: float) -> tuple[list[str], list[str]]:
    """Return the epoch's position and what is left of it, both as parts of falling importance."""
    position = [f"ep {model.epoch + 1}{_of_epochs(model)}"]
    if model.epoch_batches:
        total = f.steps(model.epoch_batches)
        position.append(f"  {f.steps(model.epoch_step):>{len(total)}}/{total}")
    if model.ended is not None:
        return position, [""]
    eta, validation = model.epoch_eta(now), model.pace.validation
    parts = ["ETA --" if eta is None else f"ETA {f.span(eta)}", ""]
    if validation.count and validation.mean >= 0.5:
        parts.append(f" · val {f.span(validation.mean)}/epoch counted")
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


def bare(grid: Grid, model: DashboardModel, now: float) -> None:
    """Draw what fits where there is no room for boxes: whole fields only, the most important first."""
    share, eta, loss = model.progress(now), model.eta(now), model.series["loss"]
    word, _ = status(model, now)
    total = f"/{model.total_steps}" if model.total_steps else ""
    first = [f"R8 {word[0] if word.endswith('RUN') else word}"]
    first.append(f"{100 * share:.1f}%" if share is not None else f"{model.step}")
    first += [f"ep{model.epoch + 1}{_of_epochs(model)}", f"{model.step}{total}"]
    if model.ended is None:
        first.append("ETA --" if eta is None else f"ETA {f.span(eta[0])}")
    second = ["waiting for the first loss"]
    if loss.count:
        second = [f"loss {f.short(model.loss)}", f"ema {f.short(loss.averages[0])}", f"lr {f.short(model.lr)}"]
        metrics = sorted(model.metrics.items(), key=lambda item: not is_validation(item[0]))
        second += [f"{_SHORT.get(name, name)} {f.short(metric.last)}" for name, metric in metrics if not is_part(name)]
    third = [f"!{model.spikes} R{model.rollbacks}" + f" nan {model.nonfinite}" * bool(model.nonfinite)]
    if model.entries:
        last = model.entries[-1]
        third.append(f"last: {last.icon} {last.kind} {f.rough(max(0.0, now - last.time))} ago")
    for y, fields in enumerate((first, second, third)):
        x = 0
        for i, text in enumerate(fields):
            if not i or x + cell_width(text) <= grid.width:
                x = grid.put(y, x, text, Style.NORMAL if y else Style.BOLD) + 1
    hint = f"({grid.width}x{grid.height}: enlarge to {MIN_WIDTH}x{MIN_HEIGHT} for charts)"
    if cell_width(hint) <= grid.width:
        grid.put(3, 0, hint, Style.DIM)


def key_line(grid: Grid, y: int, x: int, width: int, view: ViewState, now: float) -> None:
    """Draw the line of keys, or what is being typed."""
    if view.editing:
        grid.put(y, x, clip(f"filter: {view.filter}_   Enter keep  Esc clear", width), Style.BOLD, x + width)
        return
    control = [] if view.readonly else [("s", "stop…"), ("c", "ckpt"), ("p", "go on" if view.paused else "pause…")]
    keys = [("q", "close" if view.readonly else "detach"), *control]
    wide, hint = grid.width >= WIDE, 0 <= now - view.opened < GLYPH_HINT_SECONDS
    keys += [("g", "if the chart looks broken"), ("?", "help")] * hint
    keys += [("1-6", "focus")] * wide + [("←→", "metric"), ("y", "log"), ("z", "smooth")]
    keys += [("x", "axis"), ("/", "filter")] * wide
    if not hint:
        keys += [("g", "glyphs")] * wide + [("?", "help")]
    end = x + width
    for key, meaning in keys:
        if x + len(key) + len(meaning) + 1 > end:
            continue
        x = grid.put_all(y, x, ((key, Style.BOLD), (f" {meaning}  ", Style.DIM)), end)


def overlay(grid: Grid, view: ViewState) -> None:
    """Draw a page of the help, or a question and what has been typed in answer, over the middle of the grid."""
    if view.help:
        title, rows = _PAGES[view.help - 1]
        title = f"{title} · page {view.help} of {len(_PAGES)} · ? next, Esc close"
        rows = tuple(row for row in rows if not (view.readonly and row[0] in {"s", "c", "p"}))
    else:
        title, rows = _CONFIRM[view.confirm]
        title, rows = f"{title} type a word", (*rows, (">", f"{view.typed}_"))
    left = max(len(key) for key, _ in rows)
    width = min(grid.width, left + max(len(text) for _, text in rows) + 7)
    height = min(grid.height, len(rows) + 2)
    y, x = (grid.height - height) // 2, (grid.width - width) // 2
    inner = width - 2
    grid.put(y, x, "┌" + "─" * inner + "┐", Style.BOLD)
    grid.put(y, x + 2, f" {title} ", Style.TITLE)
    for row, (key, text) in enumerate(rows[: height - 2], start=y + 1):
        grid.put(row, x, "│" + " " * inner + "│", Style.BOLD)
        grid.put(row, x + 2, key, Style.BOLD, x + width - 1)
        grid.put(row, x + 4 + left, text, Style.NORMAL, x + width - 1)
    grid.put(y + height - 1, x, "└" + "─" * inner + "┘", Style.BOLD)
