"""The log display: a plain line every 30 seconds, epoch or notable event. No escape sequences, no carriage returns."""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

from learnit_r8.dashboard.displays.display import POSIX, Display, TerminalGone
from learnit_r8.dashboard.drawing.render import Scene, render
from learnit_r8.dashboard.keys import ViewState
from learnit_r8.events import Event
from learnit_r8.run.journal import entry
from learnit_r8.run.model import DashboardModel
from learnit_r8.run.styles import Style

HEARTBEAT = 30.0
"""Seconds between lines when nothing notable happens."""
BURST = 20
"""Lines of one kind in one heartbeat; the rest is counted, so that a run of spikes does not fill a disk."""
_PIECE = 512
"""Bytes in one write: a pipe that polls writable takes PIPE_BUF of them at once, and POSIX has that at 512 or more."""

_VIEW = ViewState(glyphs="ascii")
_NEVER_QUIET = {Style.BAD, Style.WARN, Style.TITLE}
"""Styles of news that are faults, what became of them, or the run's own beginning and end."""


def event_line(event: Event) -> str | None:
    """Return an event as one plain line, None for one that is no news by itself."""
    news = entry(event)
    if news is None:
        return None
    clock = time.strftime("%H:%M:%S", time.localtime(event.time))
    return f"r8 {clock} step {event.step} {news.kind}: {plain(news.text)}"


def status_line(model: DashboardModel, now: float) -> str:
    """Return the run's progress as one plain line."""
    rows = [" ".join(row.split()) for row in render(Scene(model), _VIEW, 56, 2, now).rows()]
    return f"r8 {time.strftime('%H:%M:%S', time.localtime(now))} {plain(' | '.join(row for row in rows if row))}"


def plain(text: str) -> str:
    """Return `text` on one line and without control characters."""
    return "".join(char if char.isprintable() else " " for char in text)


class LogLines(Display):
    """Writes to standard output whenever that is possible without waiting; lines that find no room wait their turn.

    Args:
        out: Where lines go.
        now: Wall-clock time of opening.
        quiet: Leave out what is routine (the user has just closed the screen), never a fault or the end.
    """

    name = "log"

    def __init__(self, out: Outlet, now: float, quiet: bool = False) -> None:
        self._out = out
        self._quiet = quiet
        self._last_beat = now
        self._burst: Counter[str] = Counter()
        self._step = -1

    def tick(self, model: DashboardModel, fresh: Sequence[Event], now: float) -> float:
        """Write what is due."""
        for event in fresh:
            news = entry(event)
            if news is None or (self._quiet and news.style not in _NEVER_QUIET):
                continue
            self._burst[news.kind] += 1
            if self._burst[news.kind] <= BURST:
                self._out.line(event_line(event) or "")
        if now - self._last_beat >= HEARTBEAT:
            self._beat(model, now)
        self._out.pump()
        return 0.5

    def _beat(self, model: DashboardModel, now: float) -> None:
        self._last_beat = now
        muted = [f"{count - BURST} {kind}" for kind, count in self._burst.items() if count > BURST]
        if muted:
            self._out.line(f"r8 ... and more events: {', '.join(muted)}")
        self._burst.clear()
        if model.step != self._step:
            self._step = model.step
            self._out.line(status_line(model, now))

    def leave(self) -> None:
        """Write what still waits, if there is room."""
        with contextlib.suppress(TerminalGone):
            self._out.pump(0.2)

    def release(self, gone: bool = False) -> None:
        """Close the outlet."""
        self._out.close()


class Outlet:
    """Writes text to a stream without ever waiting for its reader.

    A file is written through its descriptor, past Python's buffer: a thread that waits inside that buffer holds a
    lock which the interpreter needs at exit. Other streams (`StringIO`, and a notebook's, whose descriptor leads to the
    server's terminal) are written as they are.

    Args:
        stream: `sys.stdout` when None.
    """

    def __init__(self, stream: Any = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._fd = -1
        self._own = False
        self._waiting: deque[bytes] = deque(maxlen=256)
        self._encoding = getattr(self._stream, "encoding", None) or "utf-8"
        with contextlib.suppress(AttributeError, OSError, ValueError):
            # Windows has no way to ask for room: there the stream itself is written.
            plain = isinstance(self._stream, io.TextIOWrapper) and POSIX
            self._fd = self._stream.fileno() if plain else -1
            if os.isatty(self._fd):
                # A terminal may have room for less than one line: only a non-blocking descriptor is safe.
                self._fd = os.open(os.ttyname(self._fd), os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
                self._own = True

    def line(self, text: str) -> None:
        """Queue one line; the oldest of 256 waiting ones is dropped."""
        self._waiting.append(f"{text}\n".encode(self._encoding, "replace"))

    def pump(self, seconds: float = 0.0) -> None:
        """Write queued lines until there is no room for `seconds`.

        Raises:
            TerminalGone: The reader is gone.
        """
        try:
            while self._waiting:
                if self._fd < 0:
                    self._stream.write(self._waiting[0].decode(self._encoding))
                    self._stream.flush()
                    self._waiting.popleft()
                elif not self._room(seconds) or not self._write_some():
                    return
        except (OSError, ValueError) as error:
            self._waiting.clear()
            raise TerminalGone(str(error)) from error

    def _write_some(self) -> bool:
        data = self._waiting[0]
        try:
            written = os.write(self._fd, data[:_PIECE])
        except BlockingIOError:
            return False
        if written == len(data):
            self._waiting.popleft()
        else:
            self._waiting[0] = data[written:]
        return True

    def _room(self, seconds: float) -> bool:
        poller = select.poll()
        poller.register(self._fd, select.POLLOUT)
        return bool(poller.poll(seconds * 1000))

    def close(self) -> None:
        """Close the descriptor if it is an own one."""
        if self._own:
            self._own = False
            with contextlib.suppress(OSError):
                os.close(self._fd)
