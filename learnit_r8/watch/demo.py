"""`r8 demo`: the synthetic run of `dashboard/demo.py`, played at a readable speed on the best display that there is."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from learnit_r8 import events as e
from learnit_r8.core.clock import Clock
from learnit_r8.dashboard import open_dashboard
from learnit_r8.dashboard.demo import DemoRun
from learnit_r8.errors import ConfigError
from learnit_r8.events import Event
from learnit_r8.run.events_file import JsonlSink
from learnit_r8.run.tail import EVENTS_FILE
from learnit_r8.types import Command

_STOPS = (Command.STOP_AFTER_STEP, Command.STOP_AFTER_EPOCH, Command.STOP_NOW)


class DemoClock:
    """A wall clock that runs `speed` times as fast from its start on, and stands still while paused."""

    def __init__(self, speed: float, real: Clock) -> None:
        self.speed = speed
        self.started = real.wall()
        self._real = real
        self._from = real.monotonic()

    def wall(self) -> float:
        """Return the run's time, seconds since the Unix epoch."""
        return self.started + (self._real.monotonic() - self._from) * self.speed

    def wait_until(self, moment: float) -> None:
        """Sleep until the run's time is `moment`."""
        left = (moment - self.wall()) / self.speed
        if left > 0.002:  # shorter naps cost more than they are
            time.sleep(left)

    def hold(self, seconds: float) -> None:
        """Let real time pass without the run's time."""
        time.sleep(seconds)
        self._from += seconds


def play(
    ui: str, speed: float, epochs: int, seed: int, log_dir: Path | None, environment: Mapping[str, str], real: Clock
) -> None:
    """Show the run until it ends or is stopped; `log_dir` gets its event log, for `r8 watch`.

    Raises:
        ConfigError: The environment says that nothing is to be shown.
    """
    clock = DemoClock(speed, real)
    dashboard = open_dashboard(ui, log_dir=log_dir, environment=environment, clock=clock.wall)
    if dashboard is None:
        raise ConfigError(["nothing to show: the dashboard is off here; unset R8_UI, or try r8 demo --ui log"])
    log = None if log_dir is None else JsonlSink(log_dir / EVENTS_FILE)
    listeners = [dashboard.record, *([] if log is None else [log.record])]

    def tell(event: Event) -> None:
        for record in listeners:
            record(event)

    with dashboard:
        at: dict[str, Any] = {"time": clock.started, "step": 0}
        ended = False
        try:
            for _, event in DemoRun(epochs=epochs, seed=seed, start=clock.started):
                clock.wait_until(event.time)
                tell(event)
                at, ended = {"time": event.time, "step": event.step}, isinstance(event, e.RunEnded)
                if dashboard.name == "curses" and isinstance(event, e.EpochEnded):
                    print(f"demo: what you print appears here (epoch {event.epoch + 1} is over)")  # noqa: T201
                # Off: the terminal or the pipe's reader is gone.
                if _stopped(dashboard.commands, tell, clock, at) or dashboard.name == "off":
                    break
        except KeyboardInterrupt:
            pass
        finally:
            if not ended:
                tell(e.RunEnded(**at, reason="stopped", seconds=at["time"] - clock.started))
            if log is not None:
                log.close()


def _stopped(commands: deque[Command], tell: Callable[[Event], None], clock: DemoClock, at: dict[str, Any]) -> bool:
    """Obey the keys as the training loop does; return whether one of them asked for the end."""
    paused = False
    while commands or paused:
        if not commands:
            clock.hold(0.05)
            continue
        command = commands.popleft()
        if command in _STOPS:
            return True
        if command is Command.CHECKPOINT:
            tell(e.CheckpointSaved(**at, path="checkpoints/by-hand", bytes=412_000_000, seconds=0.4))
        else:
            paused = command is Command.PAUSE
            tell(e.Paused(**at, paused=paused))
    return False
