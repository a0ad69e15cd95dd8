"""The dashboard as a sink: a deque that the training thread appends to, and one thread that does everything else.

```
training thread ── record() ──▶ deque ──▶ dashboard thread: model.consume, display.tick
                ◀── commands ── deque ◀── keys
```

The display may change while a run goes on: `q` puts the log in place of the screen, Ctrl-Z and `fg` bring it back, an
exception brings the next simpler one.
Nothing that happens in the thread reaches the training thread, and `close` waits one second for it at most.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from learnit_r8.dashboard.displays.choice import Surroundings, below, default_glyphs, is_tty
from learnit_r8.dashboard.displays.display import Detach, Display
from learnit_r8.dashboard.displays.log_lines import LogLines
from learnit_r8.dashboard.displays.summary import summary_text
from learnit_r8.dashboard.terminal.board import TerminalGone, Waker
from learnit_r8.dashboard.terminal.hooks import TalkHooks
from learnit_r8.dashboard.terminal.outflow import Outlet
from learnit_r8.events import Event, Notice
from learnit_r8.run.model import DashboardModel
from learnit_r8.types import Command

QUEUE = 65536
"""Events that wait for the thread; more than that drops the oldest."""
_SLICE = 250
_BREATH = 5e-5
"""After so many events the thread naps for so long: the training thread may be waiting for the GIL."""
_JOIN_SECONDS = 1.0
_LEAVE_SECONDS = 10.0
"""A prompt waits so long for the screen to be left: printed earlier it would be drawn over."""
_NOT_MINE = [f"SIG{name}" for name in ("INT", "TERM", "HUP", "TTOU", "TTIN", "WINCH", "CHLD", "USR1", "USR2", "ALRM")]

_NOT_CLOSED = "not closed: write `with R8Scheduler(...) as scheduler:`, or call scheduler.close() after the loops"


class Dashboard:
    """Shows a run and takes keys; open one with `open_dashboard`.

    Attributes:
        record: Takes one event; it is the deque's own `append`.
        commands: What keys asked for, polled by the training loop.
        model: The run's numbers. Owned by the dashboard's thread until `close`.
        fault: The last exception that cost a display; empty when there was none.
    """

    ignores_batches = patient = True

    def __init__(
        self,
        name: str,
        around: Surroundings,
        environment: Mapping[str, str],
        clock: Callable[[], float],
        *,
        reason: str = "",
        readonly: bool = False,
        console: Path | None = None,
    ) -> None:
        self.commands: deque[Command] = deque()
        self._queue: deque[Event] = deque(maxlen=QUEUE)
        self.record = self._queue.append
        self.model = DashboardModel()
        self.fault = ""
        self._around, self._readonly, self._console, self._clock = around, readonly, console, clock
        self._environment = environment
        self._pid = os.getpid()
        self._closed = self._forgotten = False
        self._held, self._free = threading.Event(), threading.Event()
        self._free.set()
        self._waker = Waker()
        self._detached = self._continued = False
        self._on_continue: Any = None
        self._console_used: Path | None = None
        self._display = Display()
        self._display = self._build(name)
        if reason:
            self._notice(f"{self.name} dashboard: {reason}", "info")
        self._hooks = TalkHooks(self.suspended, self.close)
        if hasattr(signal, "SIGCONT") and self.name == "curses":  # of which the main thread alone is capable
            self._on_continue = signal.signal(signal.SIGCONT, self._continue)
        _open.add(self)
        atexit.register(self._close_at_exit)
        self._thread = threading.Thread(target=self._run, name="r8-dashboard", daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        return self._display.name

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Give the terminal to the caller, for `input()` or a debugger, and take it back afterwards."""
        lent = not self._free.is_set()
        if self._closed or lent or os.getpid() != self._pid or threading.current_thread() is self._thread:
            yield
            return
        display = self._display
        self._held.clear()
        self._free.clear()
        self._waker.wake()
        self._held.wait(_LEAVE_SECONDS if self._thread.is_alive() else 0.0)
        display.board.lend()
        try:
            yield
        finally:
            if display is self._display and not self._closed:
                display.board.reclaim()
            self._free.set()

    def close(self) -> None:
        """Restore the terminal and print the summary; harmless when called again or in a forked child."""
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        atexit.unregister(self._close_at_exit)
        self._hooks.remove()
        with contextlib.suppress(ValueError):  # closed by another thread than the main one
            if self._on_continue is not None and signal.getsignal(signal.SIGCONT) == self._continue:
                signal.signal(signal.SIGCONT, self._on_continue)
        _open.discard(self)
        self._free.set()
        self._waker.wake()
        try:
            self._thread.join(_JOIN_SECONDS)
        finally:
            stuck, board = self._thread.is_alive(), self._display.board
            with contextlib.suppress(Exception):
                board.emergency() if stuck else board.release()
        if not stuck:
            self._waker.close()
            with contextlib.suppress(Exception):
                self._take_events()
                self._summarise()

    def _close_at_exit(self) -> None:
        self._forgotten = True
        self.close()

    def __enter__(self) -> Dashboard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # The dashboard's thread, from here to `_change_display`.

    def _run(self) -> None:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_BLOCK, {getattr(signal, name) for name in _NOT_MINE})
        while True:
            try:
                self._serve()
            except Detach:
                self._detached, self._continued = True, False
                self._change_display("log")
            except Exception as error:
                self.fault, gone = f"{type(error).__name__}: {error}", isinstance(error, TerminalGone)
                name = "off" if gone else below(self.name, self._around)
                if not gone:
                    self._notice(f"dashboard: {self.name} gave way to {name} ({self.fault})", "warning")
                self._change_display(name, gone)
            else:
                return

    def _serve(self) -> None:
        while True:
            if not self._free.is_set():
                self._display.leave()
                self._held.set()
                self._free.wait()
                if self._closed:
                    return
            if self._detached and self._continued:
                self._detached = False
                self._change_display("curses")
            display, closing = self._display, self._closed
            due = closing or display.due() or len(self._queue) > QUEUE // 2
            fresh = self._take_events(later=not (closing or display.whole())) if due else []
            if self.model.checkpoint is not None:
                display.board.checkpoint(self.model.checkpoint.path)
            delay = display.tick(self.model, fresh, self._clock())
            if closing:
                display.leave()
                return
            self._waker.wait(delay, display.board.inputs)

    def _take_events(self, later: bool = False) -> list[Event]:
        """Move what has been recorded into the model, at most one queue's worth; `later` as in `consume_all`."""
        taken = [self._queue.popleft() for _ in range(min(QUEUE, len(self._queue)))]
        for first in range(0, len(taken) or 1, _SLICE):
            if first and not self._closed:
                time.sleep(_BREATH)
            self.model.consume_all(taken[first : first + _SLICE], later)
        return taken

    def _change_display(self, name: str, gone: bool = False) -> None:
        before, self._display = self._display, Display()
        with contextlib.suppress(Exception):
            before.leave()
        with contextlib.suppress(Exception):
            before.board.abandon() if gone else before.board.release()
        self._display = self._build(name)

    # Either thread.

    def _build(self, name: str) -> Display:
        """Return the display called `name`, or the first below it that can be built."""
        while True:
            try:
                display = self._built(name)
            except Exception as error:  # any reason at all: a dashboard that cannot start is not training's problem
                self.fault = f"{type(error).__name__}: {error}"
                self._notice(f"dashboard: no {name} ({self.fault})", "warning")
                name = below(name, self._around)
            else:
                if display.board.prints is not None:
                    self._console_used = display.board.prints.path
                return display

    def _built(self, name: str) -> Display:
        match name:
            case "log":
                out = Outlet()
                if self._detached:
                    back = "; Ctrl-Z and fg: back" if hasattr(signal, "SIGCONT") else ""
                    out.line(f"r8: view closed, training goes on and tells its news here{back}")
                return LogLines(out, self._clock(), quiet=self._detached)
            case "notebook":
                from learnit_r8.dashboard.displays.notebook import Notebook

                return Notebook()
            case "rich":
                from learnit_r8.dashboard.displays.rich_live import RichLive

                return RichLive("ascii" if default_glyphs(self._environment) == "ascii" else "blocks", self._console)
            case "curses":
                from learnit_r8.dashboard.displays.screen import Screen

                return Screen(self._environment, self.commands, self._console, self._readonly, self._clock())
        return Display()

    def _notice(self, message: str, level: str) -> None:
        self._queue.append(Notice(time=self._clock(), step=self.model.step, message=message, level=level))

    def _summarise(self) -> None:
        with contextlib.suppress(AttributeError):  # it may be anything that has a `write`
            sys.stdout.flush()
        glyphs, width = "ascii", 80
        if is_tty(sys.stdout):
            glyphs = default_glyphs(self._environment)
            with contextlib.suppress(OSError, ValueError):  # of the terminal itself: COLUMNS may be of another day
                width = min(100, os.get_terminal_size(sys.stdout.fileno()).columns or width)
        text = summary_text(self.model, width, glyphs)
        try:
            text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
        except UnicodeEncodeError:  # a stream may be less than its terminal
            text = summary_text(self.model, width, "ascii")
        lines = text.splitlines()
        if self._console_used is not None and self._console_used.exists():
            lines.append(f"  console     {self._console_used}")
        if self._forgotten and self.model.ended is None and self.model.run:
            lines.append(_NOT_CLOSED)
        out = Outlet()
        for line in lines:
            out.line(line)
        with contextlib.suppress(TerminalGone):
            out.pump(0.25)
        out.release()

    def _continue(self, number: int, frame: Any) -> None:
        """Hear of `fg`."""
        self._continued = True
        self._waker.wake()
        if callable(self._on_continue):
            self._on_continue(number, frame)


_open: weakref.WeakSet[Dashboard] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for dashboard in list(_open):
        dashboard._waker.close()
        with contextlib.suppress(Exception):
            dashboard._display.board.forget()
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
