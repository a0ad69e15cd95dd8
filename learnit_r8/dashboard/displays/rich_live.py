"""The rich display: a few live lines under the user's own prints, for terminals on which curses cannot run."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, cast

from learnit_r8.dashboard.displays.display import Display, TerminalGone
from learnit_r8.dashboard.displays.log_lines import event_line
from learnit_r8.dashboard.drawing.cells import Grid
from learnit_r8.dashboard.drawing.render import Scene, render
from learnit_r8.dashboard.keys import ViewState
from learnit_r8.dashboard.terminal.capture import Capture
from learnit_r8.dashboard.terminal.guardian import Guardian, stty_form
from learnit_r8.dashboard.terminal.tty import Tty
from learnit_r8.events import Event
from learnit_r8.run.model import DashboardModel
from learnit_r8.run.styles import Style

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


class RichLive(Display):
    """Draws at most `MAX_LINES` lines twice a second; whatever is printed, by Python, C or a child, appears above them.

    Args:
        glyphs: "braille", "blocks" or "ascii".
        console: File for the prints; a temporary one when None.
    """

    name = "rich"

    def __init__(self, glyphs: str = "blocks", console: Path | None = None) -> None:
        from rich.console import Console

        with contextlib.ExitStack() as undo:
            self._tty = Tty()
            undo.callback(self._tty.close)
            self._capture = Capture(console)
            undo.callback(self._capture.close)
            modes = stty_form(self._tty.fd)
            self._guardian = Guardian(self._tty.fd, modes, modes, b"", self._capture.path, self._capture.start)
            undo.pop_all()
        self._view = ViewState(glyphs=glyphs, readonly=True)
        self._events: list[str] = []
        self._live: Any = None
        file = cast("IO[str]", _TtyFile(self._tty))
        self._console = Console(file=file, force_terminal=True, legacy_windows=False)

    @property
    def console_path(self) -> Path:
        """The file with the user's prints."""
        return self._capture.path

    def tick(self, model: DashboardModel, fresh: Sequence[Event], now: float) -> float:
        """Draw one frame, unless the terminal still chews on the last one."""
        from rich.live import Live
        from rich.text import Text

        self._events = [*self._events, *filter(None, map(event_line, fresh))][-_EVENT_LINES:]
        if not self._tty.in_foreground():
            return _PERIOD
        if model.checkpoint is not None:
            self._guardian.checkpoint(model.checkpoint.path)
        self._tty.send(b"")
        if self._tty.congested:
            return _PERIOD
        width, height = self._tty.size()
        self._console.size = (width, height)
        printed = self._capture.unshown(lines=True)
        if printed and self._live is not None:
            self._erase()
        self._tty.send(printed)
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
            self._live.start()
            self._console.show_cursor(True)  # nobody would bring it back after SIGKILL
        grid = render(Scene(model), replace(self._view, paused=model.paused), width - 1, 3, now)
        text = _as_text(grid)
        for line in self._events:
            text.append(f"\n{line[: width - 1]}", "dim")
        self._live.update(Text("\n").join(text.split("\n")[: min(MAX_LINES, height - 1)]), refresh=True)
        return _PERIOD

    def _erase(self) -> None:
        """Take the live lines away: the next ones are drawn below what is printed now."""
        live, self._live = self._live, None
        live.transient = True
        live.stop()

    def leave(self) -> None:
        """Stop drawing; the last frame stays above whatever follows."""
        if self._live is not None:
            live, self._live = self._live, None
            with contextlib.suppress(TerminalGone):
                live.stop()
                self._tty.send(b"", 0.3)

    def lend(self) -> None:
        """Put on the terminal what is still unshown, and let prints reach it."""
        self._show_rest()
        self._capture.release()
        self._show_rest()

    def reclaim(self) -> None:
        """Send prints into the file again."""
        self._capture.engage()

    def _show_rest(self, last: bool = False) -> None:
        with contextlib.suppress(TerminalGone):
            self._tty.send(self._capture.unshown(last), 0.5)

    def release(self, gone: bool = False) -> None:
        """Give the descriptors back and close the terminal."""
        if not gone:
            self.lend()
            self._show_rest(last=True)
            self._capture.close()
        self._guardian.dismiss()
        self._tty.close()

    def emergency(self) -> None:
        """Give the descriptors back and show the cursor."""
        self._tty.muted = True
        self._capture.release()
        self._guardian.dismiss()

    def forget(self) -> None:
        """Close the child's copies."""
        self._guardian.forget()
        self._tty.close()


class _TtyFile:
    """A text file on the terminal that never waits for it."""

    encoding = "utf-8"

    def __init__(self, tty: Tty) -> None:
        self._tty = tty

    def write(self, text: str) -> int:
        # Modes are the user's here: the terminal maps newlines.
        self._tty.send(text.encode("utf-8", "replace"))
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
