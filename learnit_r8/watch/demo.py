"""`r8 demo`: the synthetic run of `dashboard/demo.py`, played at a readable speed on the best display that there is."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from learnit_r8 import events as e
from learnit_r8.core.clock import Clock
from learnit_r8.dashboard import open_dashboard
from learnit_r8.dashboard.demo import DemoRun
from learnit_r8.dashboard.sink import Dashboard
from learnit_r8.errors import ConfigError
from learnit_r8.events import Event
from learnit_r8.run.events_file import JsonlSink
from learnit_r8.run.tail import EVENTS_FILE
from learnit_r8.types import Command

_STOPS = (Command.STOP_AFTER_STEP, Command.STOP_AFTER_EPOCH, Command.STOP_NOW)


class DemoClock:
    """A wall clock that runs `speed` times as fast from its start on, and stands still while paused.

    Args:
        speed: Above 0.
        real: The clock that it follows.
    """

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
    """Show the run until it ends or is stopped.

    Args:
        ui: As for `open_dashboard`.
        speed: How many times faster than its own time it runs.
        epochs: Epochs of 400 steps of 50 ms.
        seed: Decides every random number.
        log_dir: Where the event log goes, for `r8 watch`; None for no log.
        environment: `os.environ`.
        real: Source of real time.

    Raises:
        ConfigError: The environment says that nothing is to be shown.
    """
    clock = DemoClock(speed, real)
    dashboard = open_dashboard(ui, log_dir=log_dir, environment=environment, clock=clock.wall)
    if dashboard is None:
        raise ConfigError(["nothing to show: the dashboard is off here; unset R8_UI, or try r8 demo --ui log"])
    log = None if log_dir is None else JsonlSink(log_dir / EVENTS_FILE)
    run = DemoRun(epochs=epochs, seed=seed, start=clock.started)
    with dashboard:
        last: Event | None = None
        try:
            for _, event in run:
                clock.wait_until(event.time)
                _record(dashboard, log, event)
                last = event
                if dashboard.name == "curses" and isinstance(event, e.EpochEnded):
                    print(f"demo: what you print appears here (epoch {event.epoch + 1} is over)")  # noqa: T201
                # Off: the terminal or the pipe's reader is gone.
                if _stopped(dashboard, log, clock, event) or dashboard.name == "off":
                    break
        except KeyboardInterrupt:
            pass
        finally:
            if last is not None and not isinstance(last, e.RunEnded):
                _record(
                    dashboard,
                    log,
                    e.RunEnded(time=last.time, step=last.step, reason="stopped", seconds=last.time - clock.started),
                )
            if log is not None:
                log.close()


def _record(dashboard: Dashboard, log: JsonlSink | None, event: Event) -> None:
    dashboard.record(event)
    if log is not None:
        log.record(event)


def _stopped(dashboard: Dashboard, log: JsonlSink | None, clock: DemoClock, event: Event) -> bool:
    """Obey the keys as the training loop does; return whether one of them asked for the end."""
    paused = False
    while dashboard.commands or paused:
        if not dashboard.commands:
            clock.hold(0.05)
            continue
        command = dashboard.commands.popleft()
        if command in _STOPS:
            return True
        if command is Command.CHECKPOINT:
            _record(
                dashboard,
                log,
                e.CheckpointSaved(
                    time=event.time, step=event.step, path="checkpoints/by-hand", bytes=412_000_000, seconds=0.4
                ),
            )
        else:
            paused = command is Command.PAUSE
            _record(dashboard, log, e.Paused(time=event.time, step=event.step, paused=paused))
    return False
