"""The rich display: a few live lines under the user's own prints, for terminals on which curses cannot run."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

from learnit_r8.dashboard.displays.display import Display
from learnit_r8.dashboard.displays.log_lines import event_line
from learnit_r8.dashboard.drawing.render import Scene, render
from learnit_r8.dashboard.keys import ViewState
from learnit_r8.dashboard.terminal.board import TerminalGone
from learnit_r8.dashboard.terminal.posix_board import PosixTerminal
from learnit_r8.events import Event
from learnit_r8.run.model import DashboardModel
from learnit_r8.run.styles import Style

MAX_LINES = 10
_PERIOD = 0.5
_EVENT_LINES = 4
_RICH_STYLES = {
    Style.DIM: "dim", Style.BOLD: "bold", Style.GOOD: "green", Style.WARN: "yellow", Style.BAD: "bold red",
    Style.ACCENT: "cyan", Style.TITLE: "bold blue", Style.MARK: "magenta", Style.REVERSE: "reverse",
}  # fmt: skip


class RichLive(Display):
    """Draws at most `MAX_LINES` lines twice a second; what Python, C or a child prints appears above them."""

    name = "rich"

    def __init__(self, glyphs: str = "blocks", console: Path | None = None) -> None:
        from rich.console import Console

        self.board = terminal = PosixTerminal(console)
        self._tty = terminal.tty
        self._view = ViewState(glyphs=glyphs, readonly=True)
        self._events: list[str] = []
        self._live: Any = None
        self._drawn = StringIO()
        self._console = Console(file=self._drawn, force_terminal=True, legacy_windows=False)

    def tick(self, model: DashboardModel, fresh: Sequence[Event], now: float) -> float:
        from rich.live import Live
        from rich.text import Text

        self._events = [*self._events, *filter(None, map(event_line, fresh))][-_EVENT_LINES:]
        if not self._tty.in_foreground():
            return _PERIOD
        self._tty.send(b"")
        if self._tty.congested:
            return _PERIOD
        width, height = self._tty.size()
        self._console.size = (width, height)
        printed = self.board.prints.unshown(lines=True) if self.board.prints else b""
        if printed and self._live is not None:  # the lines below are drawn anew under what is printed now
            self._live.transient = True
            self._stop()
        self._tty.send(printed)
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
            self._live.start()
            self._console.show_cursor(True)  # nobody would bring it back after SIGKILL
        grid = render(Scene(model), replace(self._view, paused=model.paused), width - 1, 3, now)
        lines = [
            Text.assemble(*((run, _RICH_STYLES.get(style, "")) for _, run, style in grid.runs(y)))
            for y in range(grid.height)
        ]
        lines[-1].rstrip()
        lines += [Text(line[: width - 1], "dim") for line in self._events]
        text = Text("\n").join(lines[: min(MAX_LINES, height - 1)])
        self._live.update(text, refresh=True)
        self._send()
        return _PERIOD

    def _stop(self, seconds: float = 0.0) -> None:
        live, self._live = self._live, None
        live.stop()
        self._send(seconds)

    def _send(self, seconds: float = 0.0) -> None:
        self._tty.send(self._drawn.getvalue().encode("utf-8", "replace"), seconds)
        self._drawn.seek(0)
        self._drawn.truncate()

    def leave(self) -> None:
        if self._live is not None:
            with contextlib.suppress(TerminalGone):
                self._stop(0.3)
