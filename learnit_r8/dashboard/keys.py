"""Keys to view state and commands: a pure function, so that every key can be tested without a terminal."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from learnit_r8.types import Command

GLYPH_SETS = ("braille", "blocks", "ascii")
SCALES = ("auto", "log", "linear")
AXES = ("step", "time", "epoch")
SMOOTHINGS = (0.98, 0.995, 0.0, 0.9)
"""Decay of the drawn moving average, in the order that `z` goes through; 0 draws the raw values."""
MAX_WINDOW = 16
PANES = 6


class Action(StrEnum):
    """What a key asks of the terminal rather than of the loop."""

    DETACH = "detach"
    """Close the view; training goes on."""
    REPAINT = "repaint"
    """Clear the screen and draw every cell again."""


@dataclass(frozen=True, slots=True)
class ViewState:
    """Everything that decides how a model is shown; keys make new ones.

    Attributes:
        focus: Pane with the focus, 1 to 6; 0 for none. 1 chart, 2 now, 3 difficulty, 4 lr, 5 events, 6 console.
        zoomed: The pane in focus fills the screen (pane 3 then lists the worst samples too).
        metric: Which of `DashboardModel.metric_names()` the chart shows; taken modulo their number.
        scale: "auto", "log" or "linear".
        smoothing: Decay of the drawn moving average, one of `SMOOTHINGS`.
        x_axis: "step", "time" or "epoch".
        window: Show the last `2 ** -window` of the run.
        glyphs: "braille", "blocks" or "ascii".
        frozen: The terminal shows a copy of the model, made when `f` was pressed.
        help: The help lies over the screen.
        confirm: The stop dialogue lies over the screen.
        filter: Events and console lines that do not contain this text are hidden.
        editing: Keys go into `filter`.
        scroll: Lines that the pane in focus is scrolled back from its newest.
        paused: The loop waits; the terminal keeps it equal to `DashboardModel.paused`.
        readonly: Control keys do nothing.
        opened: Wall-clock time at which the view was opened; a hint about glyphs shows for 10 s after it.
        hz: Frames a second, shown in the title; None leaves them out.
        frame_seconds: What the last frame cost, shown among the step times; None leaves it out.
        console_title: Path and length of the console file, shown in the console's frame.
        utc_offset: Seconds that local time is ahead of UTC; None asks the operating system.
    """

    focus: int = 0
    zoomed: bool = False
    metric: int = 0
    scale: str = "auto"
    smoothing: float = SMOOTHINGS[0]
    x_axis: str = "step"
    window: int = 0
    glyphs: str = "braille"
    frozen: bool = False
    help: bool = False
    confirm: bool = False
    filter: str = ""
    editing: bool = False
    scroll: int = 0
    paused: bool = False
    readonly: bool = False
    opened: float = float("-inf")
    hz: float | None = None
    frame_seconds: float | None = None
    console_title: str = ""
    utc_offset: int | None = None


def handle_key(view: ViewState, key: str) -> tuple[ViewState, Command | Action | None]:
    """Return the view after a key, and what the key asks for.

    Args:
        view: The view before it.
        key: A character, or a name: `KEY_LEFT`, `KEY_RIGHT`, `KEY_UP`, `KEY_DOWN`, `KEY_PPAGE`, `KEY_NPAGE`, `KEY_HOME`,
            `KEY_END`, `KEY_BACKSPACE`, `KEY_RESIZE`, `ENTER`, `ESC`, `TAB`, `BACKTAB`, `^L`. Others change nothing.
    """
    return view, None
