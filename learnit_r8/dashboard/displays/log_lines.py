"""The log display: a plain line every 30 seconds, epoch or notable event. No escape sequences, no carriage returns."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence

from learnit_r8.dashboard.displays.display import Display
from learnit_r8.dashboard.drawing.render import Scene, render
from learnit_r8.dashboard.keys import ViewState
from learnit_r8.dashboard.terminal.board import TerminalGone
from learnit_r8.dashboard.terminal.outflow import Outlet
from learnit_r8.events import Event
from learnit_r8.run import formats as f
from learnit_r8.run.journal import entry
from learnit_r8.run.model import DashboardModel
from learnit_r8.run.styles import Style

HEARTBEAT = 30.0
"""Seconds between lines when nothing notable happens."""
BURST = 20
"""Lines of one kind in one heartbeat; the rest is counted, so that a run of spikes does not fill a disk."""

_VIEW = ViewState(glyphs="ascii")
_NEVER_QUIET = {Style.BAD, Style.WARN, Style.TITLE}
"""Styles of news that are faults, what became of them, or the run's own beginning and end."""


def event_line(event: Event) -> str:
    """Return an event as one plain line; "" for one that is no news by itself."""
    news = entry(event)
    return f"r8 {f.of_day(event.time, None)} step {event.step} {news.kind}: {plain(news.text)}" if news else ""


def status_line(model: DashboardModel, now: float) -> str:
    """Return the run's progress as one plain line."""
    rows = [" ".join(row.split()) for row in render(Scene(model), _VIEW, 56, 2, now).rows()]
    return f"r8 {f.of_day(now, None)} {plain(' | '.join(row for row in rows if row))}"


def plain(text: str) -> str:
    """Return `text` on one line and without control characters."""
    return "".join(char if char.isprintable() else " " for char in text)


class LogLines(Display):
    """Writes to standard output whenever that is possible without waiting; lines that find no room wait their turn.

    `quiet` leaves out what is routine (the user has just closed the screen), never a fault or the end.
    """

    name = "log"

    def __init__(self, out: Outlet, now: float, quiet: bool = False) -> None:
        self._out = self.board = out
        self._quiet = quiet
        self._last_beat = now
        self._burst: Counter[str] = Counter()
        self._step = -1

    def tick(self, model: DashboardModel, fresh: Sequence[Event], now: float) -> float:
        for event in fresh:
            news = entry(event)
            if news is None or (self._quiet and news.style not in _NEVER_QUIET):
                continue
            self._burst[news.kind] += 1
            if self._burst[news.kind] <= BURST:
                self._out.line(event_line(event))
        if now - self._last_beat >= HEARTBEAT:
            self._last_beat = now
            muted = [f"{count - BURST} {kind}" for kind, count in self._burst.items() if count > BURST]
            if muted:
                self._out.line(f"r8 ... and more events: {', '.join(muted)}")
            self._burst.clear()
            if model.step != self._step:
                self._step = model.step
                self._out.line(status_line(model, now))
        self._out.pump()
        return 0.5

    def leave(self) -> None:
        with contextlib.suppress(TerminalGone):
            self._out.pump(0.2)
