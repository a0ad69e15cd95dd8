"""The rich rung: a few live lines under the user's own prints, for terminals on which curses cannot run."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import IO, Any, cast

from learnit_r8.dashboard.cells import Grid, Style
from learnit_r8.dashboard.faces import Face
from learnit_r8.dashboard.keys import ViewState
from learnit_r8.dashboard.log_lines import event_line
from learnit_r8.dashboard.model import DashboardModel
from learnit_r8.dashboard.render import render
from learnit_r8.dashboard.tty import TerminalGone, Tty
from learnit_r8.events import Event

MAX_LINES = 10
_PERIOD = 0.5
_EVENT_LINES = 4
_RICH_STYLES = {
    Style.DIM: "dim",
    Style.BOLD: "bold",
    Style.GOOD: "green",
    Style.WARN: "yellow",
    Style.BAD: "bold red",
    Style.ACCENT: "cyan",
    Style.TITLE: "bold blue",
    Style.MARK: "magenta",
    Style.REVERSE: "reverse",
}


class RichLive(Face):
    """Draws at most `MAX_LINES` lines twice a second; Python's prints appear above them.

    Args:
        glyphs: "braille", "blocks" or "ascii".
    """

    name = "rich"

    def __init__(self, glyphs: str = "blocks") -> None:
        from rich.console import Console

        self._tty = Tty()
        self._file = _TtyFile(self._tty)
        self._streams = (sys.stdout, sys.stderr)
        self._view = ViewState(glyphs=glyphs, readonly=True)
        self._events: list[str] = []
        self._live: Any = None
        self._console = Console(file=cast("IO[str]", self._file), force_terminal=True, legacy_windows=False)

    def tick(self, model: DashboardModel, fresh: Sequence[Event], now: float) -> float:
        """Draw one frame, unless the terminal still chews on the last one."""
        from rich.live import Live
        from rich.text import Text

        self._file.drawer = threading.get_ident()
        self._events = [*self._events, *filter(None, map(event_line, fresh))][-_EVENT_LINES:]
        if not self._tty.in_foreground():
            return _PERIOD
        self._tty.send(b"")
        if self._tty.congested:
            return _PERIOD
        width, height = self._tty.size()
        self._console.size = (width, height)
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        grid = render(model, replace(self._view, paused=model.paused), width - 1, 4, now)
        text = _as_text(grid)
        for line in self._events:
            text.append(f"\n{line[: width - 1]}", "dim")
        self._live.update(Text("\n").join(text.split("\n")[: min(MAX_LINES, height - 1)]), refresh=True)
        return _PERIOD

    def leave(self) -> None:
        """Stop drawing; the last frame stays above whatever follows."""
        if self._live is not None:
            live, self._live = self._live, None
            with contextlib.suppress(TerminalGone):
                live.stop()
                self._tty.send(b"", 0.3)

    def release(self, gone: bool = False) -> None:
        """Close the terminal."""
        self._restore_streams()
        self._tty.close()

    def emergency(self) -> None:
        """Give the streams back and show the cursor."""
        self._restore_streams()
        self._tty.muted = True

    def forget(self) -> None:
        """In a child, a proxied print could wait for a lock that the parent's thread held."""
        self._restore_streams()
        self._tty.close()

    def _restore_streams(self) -> None:
        from rich.file_proxy import FileProxy

        if isinstance(sys.stdout, FileProxy):
            sys.stdout = self._streams[0]
        if isinstance(sys.stderr, FileProxy):
            sys.stderr = self._streams[1]


class _TtyFile:
    """A text file on the terminal: frames never wait for it, the user's own prints do, as without a dashboard."""

    encoding = "utf-8"

    def __init__(self, tty: Tty) -> None:
        self._tty = tty
        self.drawer = 0

    def write(self, text: str) -> int:
        own = threading.get_ident() == self.drawer
        # Modes are the user's here: the terminal maps newlines.
        self._tty.send(text.encode("utf-8", "replace"), 0.0 if own else float("inf"))
        return len(text)

    def flush(self) -> None:
        """Everything is written at once."""

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._tty.fd


def _as_text(grid: Grid) -> Any:
    from rich.text import Text

    text = Text(no_wrap=True, overflow="crop")
    for y in range(grid.height):
        if y:
            text.append("\n")
        for _, run, style in grid.runs(y):
            text.append(run, _RICH_STYLES.get(style, ""))
    text.rstrip()
    return text
