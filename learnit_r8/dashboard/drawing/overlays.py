"""The key line, the help and the stop dialogue."""

from __future__ import annotations

from collections.abc import Sequence

from learnit_r8.dashboard.drawing.cells import Grid, clip
from learnit_r8.dashboard.drawing.layout import WIDE
from learnit_r8.dashboard.keys import ViewState
from learnit_r8.run.styles import Style

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
_PAGES = (("keys", _KEYS), ("numbers", _NUMBERS), ("signs", _SIGNS))
_CONFIRM = {
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


def key_line(grid: Grid, y: int, x: int, width: int, view: ViewState, now: float) -> None:
    """Draw the line of keys, or what is being typed."""
    if view.editing:
        grid.put(y, x, clip(f"filter: {view.filter}_   Enter keep  Esc clear", width), Style.BOLD, x + width)
        return
    control = [] if view.readonly else [("s", "stop…"), ("c", "ckpt"), ("p", "go on" if view.paused else "pause…")]
    keys = [("q", "close" if view.readonly else "detach"), *control]
    hint = 0 <= now - view.opened < GLYPH_HINT_SECONDS
    if hint:
        keys += [("g", "if the chart looks broken"), ("?", "help")]
    if grid.width >= WIDE:
        keys += [("1-6", "focus"), ("←→", "metric"), ("y", "log"), ("z", "smooth"), ("x", "axis"), ("/", "filter")]
    else:
        keys += [("←→", "metric"), ("y", "log"), ("z", "smooth")]
    if not hint:
        keys += [("g", "glyphs"), ("?", "help")] if grid.width >= WIDE else [("?", "help")]
    end = x + width
    for key, meaning in keys:
        if x + len(key) + len(meaning) + 1 > end:
            continue
        x = grid.put_all(y, x, ((key, Style.BOLD), (f" {meaning}  ", Style.DIM)), end)


def _box(grid: Grid, title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Draw a titled box of two columns over the middle of the grid, no larger than the grid."""
    left = max(len(key) for key, _ in rows)
    width = min(grid.width, left + max(len(text) for _, text in rows) + 7)
    height = min(grid.height, len(rows) + 2)
    y, x = (grid.height - height) // 2, (grid.width - width) // 2
    inner = width - 2
    grid.put(y, x, "┌" + "─" * inner + "┐", Style.BOLD)
    grid.put(y, x + 2, f" {title} ", Style.TITLE)
    for i, (key, text) in enumerate(rows[: height - 2]):
        grid.put(y + 1 + i, x, "│" + " " * inner + "│", Style.BOLD)
        grid.put(y + 1 + i, x + 2, key, Style.BOLD, x + width - 1)
        grid.put(y + 1 + i, x + 4 + left, text, Style.NORMAL, x + width - 1)
    grid.put(y + height - 1, x, "└" + "─" * inner + "┘", Style.BOLD)


def help_overlay(grid: Grid, view: ViewState) -> None:
    """Draw a page of the help: the keys, or what words and signs mean."""
    title, rows = _PAGES[view.help - 1]
    shown = [row for row in rows if not (view.readonly and row[0] in {"s", "c", "p"})]
    _box(grid, f"{title} · page {view.help} of {len(_PAGES)} · ? next, Esc close", shown)


def confirm_overlay(grid: Grid, view: ViewState) -> None:
    """Draw a question, and what has been typed in answer."""
    title, rows = _CONFIRM[view.confirm]
    _box(grid, f"{title} type a word", (*rows, (">", f"{view.typed}_")))
