"""The curses rung: keys in, frames out, and the user's prints in a pane of their own."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from learnit_r8.dashboard.capture import Capture, ConsoleTail
from learnit_r8.dashboard.faces import Detach, Face
from learnit_r8.dashboard.frame_rate import FrameRate
from learnit_r8.dashboard.gpus import GpuMeter
from learnit_r8.dashboard.guardian import Guardian, stty_form
from learnit_r8.dashboard.keyboard import KeyDecoder
from learnit_r8.dashboard.keys import Action, ViewState, handle_key
from learnit_r8.dashboard.ladder import default_glyphs
from learnit_r8.dashboard.model import DashboardModel
from learnit_r8.dashboard.render import Painter, scroll_limit
from learnit_r8.dashboard.terminal import canvas
from learnit_r8.dashboard.tty import Tty
from learnit_r8.events import Event
from learnit_r8.types import Command

_LEAVE_SECONDS = 0.3
_CHART_FRAMES = 4
"""A chart is drawn anew in every fourth frame at most: once a second, less often where frames come slowly."""
_BREATH = 5e-5
"""A nap now and then lets the training thread have the GIL; one of 0 s would hardly ever hand it over."""
_ESCAPE_SECONDS = 0.05
"""A lone Escape byte is the Escape key when nothing follows it for this long; sequences arrive in one piece."""
_GAP_SECONDS = 3.0
"""A tick this late means that the process was stopped or the machine slept: the screen may hold anything."""


def _breathe() -> None:
    time.sleep(_BREATH)


@dataclass(frozen=True, slots=True)
class Scene:
    """What a frame shows.

    Attributes:
        model: The run's numbers.
        lines: What the run printed, oldest first.
        title: Where that is kept.
        others: Further runs, whose lines lie in the chart.
        own: The run is this process's: what a frame costs is one of its costs.
    """

    model: DashboardModel
    lines: Sequence[str] = ()
    title: str = ""
    others: Sequence[DashboardModel] = ()
    own: bool = True


class Screen(Face):
    """Owns the terminal while it is shown. Built in the main thread.

    Args:
        environment: For TERM and NO_COLOR.
        commands: Where the keys' commands go.
        console: File for the user's prints; a temporary one when None.
        readonly: Control keys do nothing.
        now: Wall-clock time of opening.
        look: Returns what to show; None shows the model of each tick and what this process prints.

    Raises:
        OSError: There is no controlling terminal, or no place for the console file.
    """

    name = "curses"

    def __init__(
        self,
        environment: Mapping[str, str],
        commands: deque[Command],
        console: Path | None,
        readonly: bool,
        now: float,
        look: Callable[[], Scene] | None = None,
    ) -> None:
        self._commands = commands
        self._look = look
        self._painter = Painter(between=_breathe)
        self._keys = KeyDecoder()
        self._gpus = GpuMeter(environment)
        self._rate = FrameRate()
        self._view = ViewState(glyphs=default_glyphs(environment), readonly=readonly, opened=now)
        self._lines: Sequence[str] = ()
        self._still: DashboardModel | None = None
        self._shown = False
        self._opened = self._last_tick = time.monotonic()
        self._spent = self._computed = 0.0
        self._size = (0, 0)
        self._news = True
        self._undo = contextlib.ExitStack()
        with contextlib.ExitStack() as undo:
            self._tty = Tty()
            undo.callback(self._tty.close)
            self._canvas = canvas(environment, self._tty.size())
            self._capture = Capture(console)
            undo.callback(self._capture.close)
            self._tail = ConsoleTail(self._capture.path, self._capture.start)
            self._guardian = self._watch()
            undo.callback(self._guardian.dismiss)
            self._enter()
            self._undo = undo.pop_all()

    def _watch(self) -> Guardian:
        """Start the guardian; it has to know both sets of modes as `stty` prints them."""
        saved = stty_form(self._tty.fd)
        self._tty.set_modes(self._tty.modes)
        try:
            return Guardian(self._tty.fd, saved, stty_form(self._tty.fd), self._canvas.reset_bytes)
        except BaseException:
            self._tty.set_modes(self._tty.saved)
            raise

    @property
    def console_path(self) -> Path:
        """The file with the user's prints."""
        return self._capture.path

    @property
    def inputs(self) -> tuple[int, ...]:
        """The terminal, while it is this process's turn to read it."""
        return (self._tty.fd,) if self._shown else ()

    def due(self) -> bool:
        """Return whether the next tick will draw, if anything happened."""
        return self._rate.due(time.monotonic(), fresh=True)

    def tick(self, model: DashboardModel, fresh: Sequence[Event], now: float) -> float:
        """Handle keys and size, and draw when due."""
        began = time.monotonic()
        late, self._last_tick = began - self._last_tick > _GAP_SECONDS, began
        self._news = self._news or bool(fresh)
        if not self._tty.in_foreground():
            self._shown = False
            return 0.25
        if late or not self._shown:
            self._enter()
        self._read_keys(model)
        size = self._tty.size()
        if size != self._size:
            self._size = size
            self._rate.hurry()
        self._tty.send(b"")
        if self._shown and not self._tty.congested and self._rate.due(time.monotonic(), self._news):
            self._draw(model, now)
        return _ESCAPE_SECONDS if self._keys.waiting else self._rate.wait(began)

    def _enter(self) -> None:
        self._tty.set_modes(self._tty.modes)
        self._canvas.repaint()
        self._rate.hurry()
        self._shown = True

    def _draw(self, model: DashboardModel, now: float) -> None:
        began, computed = time.thread_time(), time.process_time()
        others, self._spent = began - self._spent, began
        if model.paused != self._view.paused:
            self._view = replace(self._view, paused=model.paused)
        scene = self._own_scene(model) if self._look is None else self._look()
        self._lines = scene.lines
        view = replace(
            self._view,
            hz=round(1 / self._rate.period, 1),
            ui_share=self._spent / max(1.0, time.monotonic() - self._opened) if scene.own else None,
            gpus=self._gpus.read() if scene.own else (),
            console_title=scene.title,
        )
        self._painter.chart_seconds = _CHART_FRAMES * self._rate.period
        grid = self._painter.draw(self._still or scene.model, view, *self._size, now, scene.lines, scene.others)
        data = self._canvas.draw(grid)
        self._spent = time.thread_time()
        self._rate.drew(time.monotonic(), self._spent - began, others, computed - self._computed - others)
        self._computed = time.process_time()
        self._tty.send(data)
        self._news = False

    def _own_scene(self, model: DashboardModel) -> Scene:
        lines, count = self._tail.poll(), self._tail.count
        return Scene(model, lines, f"{self._capture.path}  {count} line{'s' * (count != 1)}")

    def _read_keys(self, model: DashboardModel) -> None:
        data = self._tty.read()
        names = self._keys.feed(data) if data or not self._keys.waiting else self._keys.flush()
        for name in names:
            self._rate.key(time.monotonic())
            if name == "^Z":
                self._stop()
                return
            self._press(name, model)

    def _press(self, name: str, model: DashboardModel) -> None:
        before = self._view
        self._view, wish = handle_key(before, name, scroll_limit(self._still or model, before, self._lines))
        if self._view.frozen != before.frozen:
            self._still = model.copy() if self._view.frozen else None
        if wish is Action.DETACH:
            raise Detach
        if wish is Action.REPAINT:
            self._canvas.repaint()
        elif isinstance(wish, Command):
            self._commands.append(wish)

    def _stop(self) -> None:
        """Ctrl-Z: give the screen back and stop the whole job, as the terminal would have done."""
        self.leave()
        os.killpg(os.getpgrp(), signal.SIGTSTP)
        # The stop takes effect within this nap; it ends after SIGCONT, and the next tick repaints.
        time.sleep(0.05)

    def leave(self) -> None:
        """Leave the alternate screen and put the modes back."""
        farewell = self._canvas.finish()
        shown, self._shown = self._shown, False
        if not shown or not self._tty.in_foreground():
            return
        self._tty.unstop()
        try:
            self._tty.send(farewell, _LEAVE_SECONDS)
        finally:
            self._tty.discard()
            self._tty.set_modes(self._tty.saved)

    def lend(self) -> None:
        """Let prints reach the terminal."""
        self._capture.release()

    def reclaim(self) -> None:
        """Send prints into the file again."""
        self._capture.engage()

    def release(self, gone: bool = False) -> None:
        """Give descriptors back, send the guardian home; on a dead terminal prints would fail and stay captured."""
        if gone:
            self._undo.pop_all()
            self._guardian.dismiss()
            self._tty.close()
        else:
            self._undo.close()

    def emergency(self) -> None:
        """Restore screen and modes by hand; the stuck thread may not touch the terminal any more."""
        self._tty.muted = True
        self._capture.release()
        self._guardian.dismiss()
        # The terminal's descriptor stays open: its number must not be given to a file of the user's.
        if self._shown and self._tty.in_foreground():
            self._tty.unstop()
            with contextlib.suppress(OSError):
                os.write(self._tty.fd, self._canvas.reset_bytes)
            self._tty.set_modes(self._tty.saved)

    def forget(self) -> None:
        """Close the child's copies."""
        self._guardian.forget()
        self._tty.close()
        self._undo.pop_all()
