"""Keys to view state and commands: a pure function, so that every key can be tested without a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from learnit_r8.dashboard.meters import Gpu
from learnit_r8.types import Command

GLYPH_SETS = ("braille", "blocks", "ascii")
SCALES = ("auto", "log", "linear")
AXES = ("step", "time", "epoch")
TO_FIT = -1.0
SMOOTHINGS = (TO_FIT, 0.9, 0.98, 0.995, 0.0)
"""Decay of the drawn moving average, in the order that `z` goes through; 0 draws the raw values, `TO_FIT` the average
that looks back over a small part of what is shown."""
MAX_WINDOW = 16
PANES = 6
CONSOLE = 6


class Action(StrEnum):
    """What a key asks of the terminal rather than of the loop."""

    DETACH = "detach"
    """Close the view; training goes on."""
    REPAINT = "repaint"
    """Clear the screen and draw every cell again."""


@dataclass(frozen=True, slots=True)
class ViewState:
    """Everything that decides how a model is shown; keys make new ones."""

    # Pane with the focus, 1 to 6; 0 for none. 1 chart, 2 now, 3 difficulty, 4 lr, 5 events, 6 console.
    focus: int = 0
    zoomed: bool = False  # the pane in focus fills the screen (pane 3 then lists the worst samples too)
    metric: int = 0  # which of `DashboardModel.metric_names()` the chart shows; taken modulo their number
    scale: str = "auto"  # "auto", "log" or "linear"
    smoothing: float = SMOOTHINGS[0]  # decay of the drawn moving average, one of `SMOOTHINGS`
    x_axis: str = "step"  # "step", "time" or "epoch"
    window: int = 0  # show the last `2 ** -window` of the run
    glyphs: str = "braille"  # "braille", "blocks" or "ascii"
    frozen: bool = False  # the terminal shows a copy of the model, made when `f` was pressed
    help: int = 0  # page of the help that lies over the screen, 1 to `HELP_PAGES`; 0 for none
    confirm: str = ""  # question that lies over the screen, a key of `WORDS`; empty for none
    typed: str = ""  # what has been typed in answer to it
    filter: str = ""  # events and console lines that do not contain this text are hidden
    editing: bool = False  # keys go into `filter`
    scroll: int = 0  # lines that the pane in focus is scrolled back from its newest
    paused: bool = False  # the loop waits; the terminal keeps it equal to `DashboardModel.paused`
    readonly: bool = False  # control keys do nothing
    # Wall-clock time at which the view was opened; a hint about glyphs shows for 10 s after it
    opened: float = float("-inf")
    hz: float | None = None  # frames a second, shown in the title; None leaves them out
    # The part of one core that the display takes, shown as time a step; None leaves it out
    ui_share: float | None = None
    gpus: tuple[Gpu, ...] = ()  # readings of this process's GPUs
    host: tuple[tuple[str, str], ...] = ()  # readings of the machine, (label, text) each
    console_title: str = ""  # path and length of the console file, shown in the console's frame
    utc_offset: int | None = None  # seconds that local time is ahead of UTC; None asks the operating system


_CONTROL = frozenset("scp")
HELP_PAGES = 3
# Whole words and Enter: keys that were meant for another window, such as `ssh`, `less` or `cp a b`, come to nothing.
WORDS: dict[str, dict[str, Command]] = {
    "stop": {"step": Command.STOP_AFTER_STEP, "epoch": Command.STOP_AFTER_EPOCH, "abort": Command.STOP_NOW},
    "pause": {"pause": Command.PAUSE},
}
_BACKSPACE = frozenset({"KEY_BACKSPACE", "\x7f", "\x08", "^H"})
_SCROLL = {"KEY_UP": 1, "KEY_DOWN": -1, "KEY_PPAGE": 10, "KEY_NPAGE": -10, "KEY_HOME": 1 << 30, "KEY_END": -(1 << 30)}
_MAX_FILTER = 40


def _next(view: ViewState, name: str, options: Sequence[Any]) -> ViewState:
    current = getattr(view, name)
    after = options.index(current) + 1 if current in options else 0
    return replace(view, **{name: options[after % len(options)]})


def _focus(view: ViewState, pane: int) -> ViewState:
    return replace(view, focus=pane, scroll=0)


def _window(view: ViewState, more: int) -> ViewState:
    return replace(view, window=min(MAX_WINDOW, max(0, view.window + more)))


_Change = Callable[[ViewState], ViewState]
_KEYS: dict[str, _Change] = {
    "?": lambda view: replace(view, help=(view.help + 1) % (HELP_PAGES + 1)),
    "s": lambda view: replace(view, confirm="stop", typed="", help=0),
    "f": lambda view: replace(view, frozen=not view.frozen),
    "g": lambda view: _next(view, "glyphs", GLYPH_SETS),
    "y": lambda view: _next(view, "scale", SCALES),
    "z": lambda view: _next(view, "smoothing", SMOOTHINGS),
    "x": lambda view: _next(view, "x_axis", AXES),
    "+": lambda view: _window(view, 1),
    "=": lambda view: _window(view, 1),
    "-": lambda view: _window(view, -1),
    "/": lambda view: replace(view, editing=True, help=0),
    "KEY_LEFT": lambda view: replace(view, metric=view.metric - 1),
    "KEY_RIGHT": lambda view: replace(view, metric=view.metric + 1),
    "TAB": lambda view: _focus(view, view.focus % PANES + 1),
    "BACKTAB": lambda view: _focus(view, (view.focus - 2) % PANES + 1 if view.focus else PANES),
    "ENTER": lambda view: replace(view, zoomed=True, focus=view.focus or 1, scroll=0),
    "ESC": lambda view: _escape(view),
    **{str(pane): (lambda view, pane=pane: _focus(view, pane)) for pane in range(1, PANES + 1)},  # type: ignore[misc]
}


def _escape(view: ViewState) -> ViewState:
    """Leave whatever is open, one thing a key."""
    if view.help:
        return replace(view, help=0)
    if view.zoomed:
        return replace(view, zoomed=False, scroll=0)
    if view.filter:
        return replace(view, filter="")
    return replace(view, focus=0, scroll=0)


def handle_key(view: ViewState, key: str, scroll_limit: int = 100_000) -> tuple[ViewState, Command | Action | None]:
    """Return the view after a key, and what the key asks for.

    Args:
        view: The view before it.
        key: A character, `^` and a letter, or a name, as `keyboard.py` makes them. Others change nothing.
        scroll_limit: Lines that the pane in focus can be scrolled (`render.scroll_limit`).
    """
    if key == "^L":
        return view, Action.REPAINT
    if view.editing:
        return _edit(view, key), None
    if view.confirm:
        return _answer(view, key)
    if key == "q":
        return view, Action.DETACH
    if view.readonly and key in _CONTROL:
        return view, None
    if key == "c":
        return view, Command.CHECKPOINT
    if key == "p":
        if view.paused:
            return replace(view, paused=False), Command.RESUME
        return replace(view, confirm="pause", typed="", help=0), None
    if key in _SCROLL:
        # The console's newest line is its last, every other pane's its first.
        distance = _SCROLL[key] if view.focus == CONSOLE else -_SCROLL[key]
        return replace(view, scroll=min(scroll_limit, max(0, view.scroll + distance))), None
    change = _KEYS.get(key)
    return (view if change is None else change(view)), None


def _answer(view: ViewState, key: str) -> tuple[ViewState, Command | None]:
    """Take a key into the answer to a question; Enter gives it, and any other word than those shown is a no."""
    if key not in {"ENTER", "ESC"}:
        return replace(view, typed=_typed(view.typed, key)), None
    found = WORDS[view.confirm].get(view.typed) if key == "ENTER" and not view.readonly else None
    return replace(view, confirm="", typed="", paused=view.paused or found is Command.PAUSE), found


def _edit(view: ViewState, key: str) -> ViewState:
    """Take a key into the filter's text."""
    if key in {"ENTER", "ESC"}:
        return replace(view, editing=False, filter=view.filter if key == "ENTER" else "")
    text = _typed(view.filter, key)
    return view if text == view.filter else replace(view, filter=text, scroll=0)


def _typed(text: str, key: str) -> str:
    if key in _BACKSPACE:
        return text[:-1]
    return (text + key)[:_MAX_FILTER] if len(key) == 1 and key.isprintable() else text
