"""`r8 watch`: the dashboard's screen and frames, fed by runs of other processes."""

from __future__ import annotations

import select
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from learnit_r8.dashboard.faces import Detach
from learnit_r8.dashboard.keys import ViewState
from learnit_r8.dashboard.ladder import choose, default_glyphs, look
from learnit_r8.dashboard.render import render
from learnit_r8.dashboard.screen import Screen
from learnit_r8.dashboard.tty import TerminalGone
from learnit_r8.errors import ConfigError
from learnit_r8.watch.run import WatchedRun


def frame(runs: Sequence[WatchedRun], width: int, height: int, now: float, environment: Mapping[str, str]) -> str:
    """Return one frame of the first run, the others drawn into its chart, and a line a run that says how it is."""
    first, *others = runs
    lines = first.console()
    title = str(first.console_path) if lines else ""
    view = ViewState(glyphs=default_glyphs(environment), readonly=True, console_title=title)
    grid = render(first.model, view, width, height, now, lines, [run.model for run in others])
    states = [run.sentence(now) for run in runs]
    if others:
        states = [f"{mark}  {text}" for mark, text in zip(_marks(len(runs)), states, strict=True)]
    return "\n".join([*(row.rstrip() for row in grid.rows()), *states])


def _marks(count: int) -> list[str]:
    """Return the letters by which the chart tells the runs; the first one's line has none."""
    return [" ", *(chr(ord("a") + i) for i in range(count - 1))]


class WatchScreen(Screen):
    """The screen of a training process, with the runs of others on it.

    Args:
        runs: The first is shown, the others' lines lie in its chart.
        environment: For TERM and NO_COLOR.
        now: Wall-clock time of opening.

    Raises:
        OSError: There is no controlling terminal.
    """

    def __init__(self, runs: Sequence[WatchedRun], environment: Mapping[str, str], now: float) -> None:
        super().__init__(environment, deque(), None, True, now)
        self._runs = runs

    def _draw(self, model: object, now: float) -> None:
        began = time.thread_time()
        first, *others = self._runs
        lines = self._lines = first.console()
        title = str(first.console_path) if lines else ""
        view = replace(self._view, hz=round(1 / self._rate.period, 1), console_title=title)
        grid = render(self._still or first.model, view, *self._size, now, lines, [run.model for run in others])
        data = self._canvas.draw(grid)
        self._rate.drew(time.monotonic(), time.thread_time() - began)
        self._tty.send(data)
        self._news = False


def show(runs: Sequence[WatchedRun], environment: Mapping[str, str], clock: Callable[[], float]) -> None:
    """Show the runs on the terminal until `q` or Ctrl-C.

    Raises:
        ConfigError: There is no terminal to draw on.
    """
    rung = choose("curses", look(environment))
    if rung.name != "curses":
        raise ConfigError([f"cannot draw here ({rung.reason}): use --once for one frame, --json for numbers"])
    screen = WatchScreen(runs, environment, clock())
    gone = False
    try:
        while True:
            fresh = [event for run in runs for event in run.poll()]
            delay = screen.tick(runs[0].model, fresh, clock())
            behind = any(run.behind for run in runs)
            _sleep(0.0 if behind else delay, screen.inputs)
    except (Detach, KeyboardInterrupt):
        pass
    except TerminalGone:
        gone = True
    finally:
        if not gone:
            screen.leave()
        screen.release(gone)


def _sleep(seconds: float, inputs: Sequence[int]) -> None:
    poller = select.poll()
    for fd in inputs:
        poller.register(fd, select.POLLIN)
    poller.poll(seconds * 1000)
