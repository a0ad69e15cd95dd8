"""Watching a run: a curses screen beside the training loop, and what stands in for it where there is no terminal."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from learnit_r8.core.clock import Clock

if TYPE_CHECKING:
    from learnit_r8.dashboard.sink import Dashboard

__all__ = ["open_dashboard"]

_CLOCK = Clock()
_OPENING = threading.Lock()


def open_dashboard(
    ui: str = "auto",
    *,
    readonly: bool = False,
    log_dir: str | Path | None = None,
    rank: int = 0,
    environment: Mapping[str, str] | None = None,
    clock: Callable[[], float] = _CLOCK.wall,
) -> Dashboard | None:
    """Open the best dashboard that this process can show; None when that is none.

    The environment's `R8_UI` overrides `ui`. Call it from the main thread, or the curses display is passed over.

    Args:
        ui: "auto", "curses", "rich", "log" or "off". One that cannot be shown gives way to the next.
        readonly: Keys cannot stop, pause or checkpoint the run.
        log_dir: The user's prints go to `console.log` in it while a screen is shown; to a temporary file when None.
        rank: Number of this process among several; "auto" shows rank 0 only.
        environment: `os.environ` when None.
        clock: Returns seconds since the Unix epoch.

    Raises:
        ConfigError: `ui` is none of the five.
    """
    from learnit_r8.core.config import UI_NAMES
    from learnit_r8.dashboard.displays import choice

    env = os.environ if environment is None else environment
    wanted = choice.wanted_ui(ui, env)
    if wanted == "off":
        return None
    with _OPENING:  # of runs in several threads one has the terminal: for the others there is none
        around = choice.look(env, rank)
        chosen = choice.choose(wanted, around)
        if chosen.name == "off":
            return None
        from learnit_r8.dashboard.sink import Dashboard

        # That "auto" writes plain lines into a pipe needs no explanation; that a wish was not met does, and a terminal.
        reason = "" if wanted == "auto" and chosen.name == "log" and not around.stdout_tty else chosen.reason
        asked = env.get("R8_UI", "").strip()
        if asked and asked.lower() not in UI_NAMES:
            reason = f"R8_UI={asked} is none of {', '.join(UI_NAMES)}"
        console = None if log_dir is None else Path(log_dir) / "console.log"
        return Dashboard(chosen.name, around, env, clock, reason=reason, readonly=readonly, console=console)
