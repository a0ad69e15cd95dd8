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
import shutil
import signal
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from learnit_r8.dashboard.displays.choice import Surroundings, below, default_glyphs
from learnit_r8.dashboard.displays.display import Detach, Display, TerminalGone
from learnit_r8.dashboard.displays.log_lines import LogLines, Outlet
from learnit_r8.dashboard.displays.summary import summary_text
from learnit_r8.dashboard.terminal.hooks import TalkHooks
from learnit_r8.dashboard.terminal.waker import Waker
from learnit_r8.events import Event, Notice
from learnit_r8.run.model import DashboardModel
from learnit_r8.types import Command

QUEUE = 65536
"""Events that wait for the thread; more than that drops the oldest."""
_SLICE = 250
_BREATH = 5e-5
"""After so many events the thread naps for so long: the training thread may be waiting for the GIL."""
_JOIN_SECONDS = 1.0
_NOT_MINE = [f"SIG{name}" for name in ("INT", "TERM", "HUP", "TTOU", "TTIN", "WINCH", "CHLD", "USR1", "USR2", "ALRM")]

_NOT_CLOSED = "not closed: write `with R8Scheduler(...) as scheduler:`, or call scheduler.close() after the loops"


class Dashboard:
    """Shows a run and takes keys; open one with `open_dashboard`.

    Args:
        name: The display to start with.
        around: What this process can show.
        reason: Why it is this one, where the user should know.
        readonly: Keys control the view only, as in `r8 watch`.
        console: File that prints go to while a screen is shown.
        environment: Variables; `os.environ` when None.
        clock: Wall-clock seconds.

    Attributes:
        record: Takes one event; it is the deque's own `append`.
        commands: What keys asked for, polled by the training loop.
        model: The run's numbers. Owned by the dashboard's thread until `close`.
        fault: The last exception that cost a display; empty when there was none.
    """

    ignores_batches = True

    def __init__(
        self,
        name: str,
        around: Surroundings,
        *,
        reason: str = "",
        readonly: bool = False,
        console: Path | None = None,
        environment: Mapping[str, str] | None = None,
        clock: Callable[[], float],
    ) -> None:
        self.commands: deque[Command] = deque()
        self._queue: deque[Event] = deque(maxlen=QUEUE)
        self.record = self._queue.append
        self.model = DashboardModel()
        self.fault = ""
        self._around, self._readonly, self._console, self._clock = around, readonly, console, clock
        self._environment = os.environ if environment is None else environment
        self._pid = os.getpid()
        self._closed = self._stopping = self._forgotten = False
        self._hold = threading.Event()
        self._held, self._unheld = threading.Event(), threading.Event()
        self._waker = Waker()
        self._wake = self._waker.wake
        self._detached = self._continued = False
        self._on_continue: Any = None
        self._console_used: Path | None = None
        self._display: Display | None = None
        self._take_display(name)
        if reason:
            self._notice(f"{self.name} dashboard: {reason}", "info")
        self._hooks = TalkHooks(self.suspended, self.close)
        self._watch_continue()
        _open.add(self)
        atexit.register(self._close_at_exit)
        self._thread = threading.Thread(target=self._run, name="r8-dashboard", daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        """The display that is shown now."""
        return "off" if self._display is None else self._display.name

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Give the terminal to the caller, for `input()` or a debugger, and take it back afterwards."""
        display = self._display
        if (
            self._closed
            or os.getpid() != self._pid
            or threading.current_thread() is self._thread
            or self._hold.is_set()
        ):
            yield
            return
        self._held.clear()
        self._unheld.clear()
        self._hold.set()
        self._wake()
        self._held.wait(_JOIN_SECONDS)
        if display is not None:
            display.lend()
        try:
            yield
        finally:
            if display is not None and display is self._display and not self._closed:
                display.reclaim()
            self._hold.clear()
            self._unheld.set()

    def close(self) -> None:
        """Restore the terminal and print the summary; harmless when called again or in a forked child."""
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = self._stopping = True
        atexit.unregister(self._close_at_exit)
        self._hooks.remove()
        self._unwatch_continue()
        _open.discard(self)
        self._unheld.set()
        self._wake()
        try:
            self._thread.join(_JOIN_SECONDS)
        finally:
            stuck = self._thread.is_alive()
            display = self._display
            if display is not None:
                with contextlib.suppress(Exception):
                    display.emergency() if stuck else display.release()
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # The dashboard's thread, from here to `_fall`.

    def _run(self) -> None:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_BLOCK, {getattr(signal, name) for name in _NOT_MINE})
        while True:
            try:
                self._serve()
            except Detach:
                self._drop_display()
                back = "; Ctrl-Z and fg: back" if hasattr(signal, "SIGCONT") else ""
                self._say([f"r8: view closed, training goes on and tells its news here{back}"])
                self._take_display("log", quiet=True)
                self._detached, self._continued = True, False
            except TerminalGone as error:
                self._fall("off", error)
            except Exception as error:
                self._fall(below(self.name, self._around), error)
            else:
                return

    def _serve(self) -> None:
        while True:
            display, stopping = self._display, self._stopping
            if self._hold.is_set():
                self._wait_out(display)
                stopping = self._stopping
                if stopping:
                    return
            if self._detached and self._continued:
                self._detached = self._continued = False
                self._drop_display()
                self._take_display("curses")
                continue
            due = display is None or stopping or display.due() or len(self._queue) > QUEUE // 2
            fresh = self._take_events() if due else []
            delay = 1.0 if display is None else display.tick(self.model, fresh, self._clock())
            if stopping:
                if display is not None:
                    display.leave()
                return
            self._waker.wait(delay, () if display is None else display.inputs)

    def _wait_out(self, display: Display | None) -> None:
        if display is not None:
            display.leave()
        self._held.set()
        self._unheld.wait()

    def _take_events(self) -> list[Event]:
        """Move what has been recorded into the model, at most one queue's worth."""
        taken = [self._queue.popleft() for _ in range(min(QUEUE, len(self._queue)))]
        for first in range(0, len(taken), _SLICE):
            if first and not self._stopping:
                time.sleep(_BREATH)
            self.model.consume_all(taken[first : first + _SLICE])
        return taken

    def _fall(self, name: str, error: Exception) -> None:
        self.fault = f"{type(error).__name__}: {error}"
        left = self.name
        self._drop_display(gone=isinstance(error, TerminalGone))
        if not isinstance(error, TerminalGone):
            self._notice(f"dashboard: {left} gave way to {name} ({self.fault})", "warning")
        self._take_display(name)

    def _drop_display(self, gone: bool = False) -> None:
        display, self._display = self._display, None
        if display is not None:
            with contextlib.suppress(Exception):
                display.leave()
            with contextlib.suppress(Exception):
                display.release(gone)

    # Either thread.

    def _take_display(self, name: str, quiet: bool = False) -> None:
        """Build the display called `name`, or the first below it that can be built."""
        while name != "off":
            try:
                self._display = self._build(name, quiet)
            except Exception as error:  # any reason at all: a dashboard that cannot start is not training's problem
                self.fault = f"{type(error).__name__}: {error}"
                self._notice(f"dashboard: no {name} ({self.fault})", "warning")
                name = below(name, self._around)
            else:
                return
        self._display = None

    def _build(self, name: str, quiet: bool) -> Display:
        now = self._clock()
        if name == "log":
            return LogLines(Outlet(), now, quiet)
        if name == "notebook":
            from learnit_r8.dashboard.displays.notebook import Notebook

            return Notebook()
        if name == "rich":
            from learnit_r8.dashboard.displays.rich_live import RichLive

            glyphs = "ascii" if default_glyphs(self._environment) == "ascii" else "blocks"
            live = RichLive(glyphs, self._console)
            self._console_used = live.console_path
            return live
        from learnit_r8.dashboard.displays.screen import Screen

        screen = Screen(self._environment, self.commands, self._console, self._readonly, now)
        self._console_used = screen.console_path
        return screen

    def _notice(self, message: str, level: str) -> None:
        self._queue.append(Notice(time=self._clock(), step=self.model.step, message=message, level=level))

    def _say(self, lines: Sequence[str]) -> None:
        out = Outlet()
        for line in lines:
            out.line(line)
        with contextlib.suppress(TerminalGone):
            out.pump(0.25)
        out.close()

    def _summarise(self) -> None:
        sys.stdout.flush()
        self._say(self._summary(sys.stdout.isatty()))

    def _summary(self, on_terminal: bool) -> list[str]:
        glyphs, width = "ascii", 80
        if on_terminal:
            glyphs = default_glyphs(self._environment)
            width = min(100, shutil.get_terminal_size().columns)
        lines = summary_text(self.model, width, glyphs).splitlines()
        path = self._console_used
        if path is not None and path.exists():
            lines.append(f"  console     {path}")
        if self._forgotten and self.model.ended is None and self.model.run:
            lines.append(_NOT_CLOSED)
        return lines

    def _watch_continue(self) -> None:
        """Hear of `fg`; a handler can only be set in the main thread."""
        number = getattr(signal, "SIGCONT", None)
        if number is not None and self.name == "curses" and threading.current_thread() is threading.main_thread():
            self._on_continue = signal.getsignal(number)
            signal.signal(number, self._continue)

    def _continue(self, number: int, frame: Any) -> None:
        self._continued = True
        self._wake()
        if callable(self._on_continue):
            self._on_continue(number, frame)

    def _unwatch_continue(self) -> None:
        number = getattr(signal, "SIGCONT", None)
        with contextlib.suppress(ValueError):  # closed by another thread than the main one
            if number is not None and self._on_continue is not None and signal.getsignal(number) == self._continue:
                signal.signal(number, self._on_continue)

    def _forget(self) -> None:
        """In a forked child."""
        self._waker.close()
        if self._display is not None:
            with contextlib.suppress(Exception):
                self._display.forget()


_open: weakref.WeakSet[Dashboard] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for dashboard in list(_open):
        dashboard._forget()
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
