"""`r8 watch`: the dashboard's screen and frames, fed by runs of other processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

from learnit_r8.dashboard.displays.choice import choose, default_glyphs, look
from learnit_r8.dashboard.displays.display import Detach
from learnit_r8.dashboard.displays.screen import Screen
from learnit_r8.dashboard.drawing.render import Scene, render
from learnit_r8.dashboard.keys import ViewState
from learnit_r8.dashboard.terminal.board import TerminalGone, Waker
from learnit_r8.errors import ConfigError
from learnit_r8.watch.run import WatchedRun


def frame(runs: Sequence[WatchedRun], width: int, height: int, now: float, environment: Mapping[str, str]) -> str:
    """Return one frame of the first run, the others drawn into its chart, and a line a run that says how it is."""
    shown = scene(runs)
    view = ViewState(glyphs=default_glyphs(environment), readonly=True, console_title=shown.title)
    grid = render(shown, view, width, height, now)
    states = [run.sentence(now) for run in runs]
    if shown.others:
        states = [f"{mark}  {text}" for mark, text in zip(_marks(len(runs)), states, strict=True)]
    return "\n".join([*(row.rstrip() for row in grid.rows()), *states])


def _marks(count: int) -> list[str]:
    """Return the letters by which the chart tells the runs; the first one's line has none."""
    return [" ", *(chr(ord("a") + i) for i in range(count - 1))]


def scene(runs: Sequence[WatchedRun]) -> Scene:
    """Return what the screen shows: the first run, with the others' lines in its chart."""
    first, *others = runs
    lines = first.console()
    return Scene(first.model, lines, str(first.console_path) if lines else "", [run.model for run in others], own=False)


def show(runs: Sequence[WatchedRun], environment: Mapping[str, str], clock: Callable[[], float]) -> None:
    """Show the runs on the terminal until `q` or Ctrl-C.

    Raises:
        ConfigError: There is no terminal to draw on.
    """
    chosen = choose("curses", look(environment))
    if chosen.name != "curses":
        raise ConfigError([f"cannot draw here ({chosen.reason}): use --once for one frame, --json for numbers"])
    screen = Screen(environment, deque(), None, readonly=True, now=clock(), look=lambda: scene(runs))
    gone, waker = False, Waker()
    try:
        while True:
            fresh = [event for run in runs for event in run.poll()]
            delay = screen.tick(runs[0].model, fresh, clock())
            behind = any(run.behind for run in runs)
            waker.wait(0.0 if behind else delay, screen.board.inputs)
    except (Detach, KeyboardInterrupt):
        pass
    except TerminalGone:
        gone = True
        screen.board.abandon()
    finally:
        if not gone:
            screen.leave()
            screen.board.release()
        waker.close()
