"""The key line, the help and the stop dialogue."""

from __future__ import annotations

from collections.abc import Sequence

from learnit_r8.dashboard.cells import Grid, Style, clip
from learnit_r8.dashboard.keys import ViewState
from learnit_r8.dashboard.layout import WIDE

GLYPH_HINT_SECONDS = 10.0
_HELP = (
    ("q", "close this view; training goes on"),
    ("s", "stop: after the step, after the epoch, or now"),
    ("c", "write a checkpoint"),
    ("p", "pause, and go on"),
    ("1-6  Tab", "focus a pane"),
    ("Enter  Esc", "zoom the pane in focus, and back"),
    ("← →", "other metric"),
    ("↑ ↓  PgUp PgDn", "scroll the pane in focus"),
    ("y", "vertical axis: auto, log, linear"),
    ("z", "smoothing: .98, .995, none, .9"),
    ("x", "horizontal axis: step, time, epoch"),
    ("+ -", "shorter and longer window"),
    ("/", "filter events and console"),
    ("g", "glyphs: braille, blocks, ASCII"),
    ("f", "freeze the picture"),
    ("^L", "repaint"),
    ("?", "this help"),
)
_CONFIRM = (
    ("s", "after this step"),
    ("e", "after this epoch, with a checkpoint"),
    ("n", "now"),
    ("Esc", "go on training"),
)


def key_line(grid: Grid, y: int, x: int, width: int, view: ViewState, now: float) -> None:
    """Draw the line of keys, or what is being typed."""
    if view.editing:
        grid.put(y, x, clip(f"filter: {view.filter}_   Enter keep  Esc clear", width), Style.BOLD, x + width)
        return
    control = [] if view.readonly else [("s", "stop…"), ("c", "ckpt"), ("p", "go on" if view.paused else "pause")]
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
        x = grid.put(y, grid.put(y, x, key, Style.BOLD, end), f" {meaning}  ", Style.DIM, end)


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
    """Draw the keys and what they do."""
    rows = [row for row in _HELP if not (view.readonly and row[0] in {"s", "c", "p"})]
    _box(grid, "keys", rows)


def confirm_overlay(grid: Grid) -> None:
    """Draw the stop dialogue."""
    _box(grid, "stop training?", _CONFIRM)
