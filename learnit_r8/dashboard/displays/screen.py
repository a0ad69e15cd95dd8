"""The curses display: keys in, frames out, and the user's prints in a pane of their own."""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from learnit_r8.dashboard.displays.choice import default_glyphs
from learnit_r8.dashboard.displays.display import Detach, Display
from learnit_r8.dashboard.drawing.cells import Grid
from learnit_r8.dashboard.drawing.layout import ROOMY
from learnit_r8.dashboard.drawing.panels import FAULTS
from learnit_r8.dashboard.drawing.render import Painter, Scene, scroll_limit
from learnit_r8.dashboard.frame_rate import FrameRate
from learnit_r8.dashboard.keys import Action, ViewState, handle_key
from learnit_r8.dashboard.meters import Meter, gpu_meter, host
from learnit_r8.dashboard.terminal.board import open_board
from learnit_r8.run.journal import Entry
from learnit_r8.run.model import DashboardModel
from learnit_r8.run.tail import ConsoleTail
from learnit_r8.types import Command

_CHART_SECONDS = 1.0
"""A chart is drawn anew once a second at most, less often where frames come slowly."""
_BREATH = 5e-5
"""A nap now and then lets the training thread have the GIL; one of 0 s would hardly ever hand it over."""
_ESCAPE_SECONDS = 0.05
"""A lone Escape byte is the Escape key when nothing follows it for this long; sequences arrive in one piece."""
_ASIDE = "another program has taken the terminal: the screen waits; wrap it in `with scheduler.terminal():`"
_GAP_SECONDS = 3.0
"""A tick this late means that the process was stopped or the machine slept: the screen may hold anything."""


class Screen(Display):
    """Owns the terminal while it is shown. Built in the main thread.

    Args:
        environment: For TERM and NO_COLOR.
        commands: Where the keys' commands go.
        console: File for the user's prints; a temporary one when None.
        readonly: Control keys do nothing.
        now: Wall-clock time of opening.
        look: Returns what to show; None shows the model of each tick and what this process prints.
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
        self._painter = Painter(between=lambda: time.sleep(_BREATH))
        self._gpus, self._host = gpu_meter(environment), Meter(host)
        self._rate = FrameRate()
        self._view = ViewState(glyphs=default_glyphs(environment), readonly=readonly, opened=now)
        self._lines: Sequence[str] = ()
        self._still: DashboardModel | None = None
        self._told: Entry | None = None
        self._shown = self._aside = False
        self._opened = self._last_tick = time.monotonic()
        self._spent = self._computed = 0.0
        self._size = (0, 0)
        self._news = True
        self.board = self._board = open_board(environment, console, prints=look is None)
        self._prints = self.board.prints
        self._tail = None if self._prints is None else ConsoleTail(self._prints.path, self._prints.start)

    def due(self) -> bool:
        return self._rate.due(time.monotonic(), fresh=True)

    def whole(self) -> bool:
        # Of a run that is only watched each frame shows everything.
        return self._look is not None or self._rate.whole(time.monotonic())

    def tick(self, model: DashboardModel, fresh: Sequence[object], now: float) -> float:
        board, began = self._board, time.monotonic()
        late, self._last_tick = began - self._last_tick > _GAP_SECONDS, began
        self._news = self._news or bool(fresh)
        if not board.mine():
            self._shown = False
            return 0.25
        if (self._aside or (self._shown and not late)) and self._step_aside(board.lent_by_force()):
            return 0.25
        if late or not self._shown:
            board.enter()
            self._rate.hurry()
            self._shown = True
        self._read_keys(model)
        size = board.size()
        if size != self._size:
            self._size = size
            self._rate.hurry()
        if self._shown and board.ready() and self._rate.due(time.monotonic(), self._news):
            self._draw(model, now)
        wait = _ESCAPE_SECONDS if board.unfinished_key else self._rate.wait(time.monotonic())
        return wait if board.key_seconds is None else min(wait, board.key_seconds)

    def _step_aside(self, taken: bool) -> bool:
        """Wait while another program has the terminal; return whether it has."""
        if taken and not self._aside:
            self._aside, self._shown = True, False
            self._board.step_aside(f"[r8] {_ASIDE}")
        elif self._aside and not taken:
            self._aside = False
            self._board.reclaim()
        return self._aside

    def _draw(self, model: DashboardModel, now: float) -> None:
        # Frames are counted from their beginnings: beside a loop that holds the GIL one takes long, but no CPU.
        start, began, computed = time.monotonic(), time.thread_time(), time.process_time()
        others, self._spent = began - self._spent, began
        told, self._told = self._told, model.entries[-1] if model.entries else None
        fault = self._told is not told and self._told is not None and self._told.icon in FAULTS
        whole = self.whole() or self._still is not None or fault
        grid = None if whole else self._painter.advance(model, now)
        if grid is None:
            whole, grid = True, self._whole(model, now)
        self._board.draw(grid)
        self._spent = time.thread_time()
        busy = computed - self._computed - others
        self._rate.drew(start, self._spent - began, others, busy, whole=whole)
        self._computed = time.process_time()
        self._news = False

    def _whole(self, model: DashboardModel, now: float) -> Grid:
        if model.paused != self._view.paused:
            self._view = replace(self._view, paused=model.paused)
        scene = self._own_scene(model) if self._look is None else self._look()
        self._lines = scene.lines
        roomy, folder = self._size[0] >= ROOMY, str(model.config.get("checkpoint_dir") or ".")
        view = replace(
            self._view,
            hz=round(1 / self._rate.period, 1),
            ui_share=self._spent / max(1.0, time.monotonic() - self._opened) if scene.own else None,
            gpus=self._gpus.read() if scene.own else (),
            host=self._host.read(folder) if scene.own and roomy else (),
            console_title=scene.title,
            glyphs=self._view.glyphs if self._board.unicode else "ascii",
        )
        self._painter.chart_seconds = max(_CHART_SECONDS, 4 * self._rate.period)
        shown = scene if self._still is None else replace(scene, model=self._still)
        return self._painter.draw(shown, view, *self._size, now)

    def _own_scene(self, model: DashboardModel) -> Scene:
        if self._tail is None or self._prints is None:
            return Scene(model)
        lines, count = self._tail.poll(), self._tail.count
        return Scene(model, lines, f"{self._prints.path}  {count} line{'s' * (count != 1)}")

    def _read_keys(self, model: DashboardModel) -> None:
        for name in self._board.pressed():
            self._rate.key(time.monotonic())
            if name == "^Z":
                self.leave()
                self._board.stop()
                return
            self._press(name, model)

    def _press(self, name: str, model: DashboardModel) -> None:
        before = self._view
        self._view, wish = handle_key(before, name, scroll_limit(self._still or model, before, self._lines))
        if self._view.frozen != before.frozen:
            model.consume_all(())  # statistics that wait
            self._still = copy.deepcopy(model) if self._view.frozen else None
        if wish is Action.DETACH:
            raise Detach
        if wish is Action.REPAINT:
            self._board.repaint()
        elif isinstance(wish, Command):
            self._commands.append(wish)

    def leave(self) -> None:
        self._shown = False
        self._board.leave()
