"""A run as its folder tells it: the event log into a model, the console file into lines."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from learnit_r8.errors import ConfigError
from learnit_r8.events import Event
from learnit_r8.run import formats as f
from learnit_r8.run.blocks import Block
from learnit_r8.run.export import silent_for
from learnit_r8.run.model import DashboardModel
from learnit_r8.run.tail import CHUNK, CONSOLE_FILE, EVENTS_FILE, ConsoleTail, EventTail

STALE_SECONDS = 60.0
_CONSOLE_BYTES = 1 << 20
"""Of a console file only so much of its end is read."""


class WatchedRun:
    """Follows one run.

    Args:
        folder: The run's `log_dir`, with `events.jsonl` in it.

    Attributes:
        model: The run's numbers.
        trouble: Why the log could not be read the last time; empty when it could.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.model = DashboardModel()
        self.trouble = ""
        self._tail = EventTail(self.folder / EVENTS_FILE)
        console = self.folder / CONSOLE_FILE
        size = console.stat().st_size if console.exists() else 0
        self._console = ConsoleTail(console, max(0, size - _CONSOLE_BYTES))

    @property
    def name(self) -> str:
        """What the run calls itself; before it has, its folder's name."""
        return self.model.run or self.folder.resolve().name

    @property
    def behind(self) -> bool:
        """There is more in the log than the last `poll` took."""
        return self._tail.behind

    @property
    def console_path(self) -> Path:
        """The file with what the run printed."""
        return self.folder / CONSOLE_FILE

    def poll(self, limit: int = CHUNK) -> list[Event | Block]:
        """Take the next events of the log into the model, `limit` bytes at most, and return them.

        What keeps the file from being read for now (a network folder that is away) is kept in `trouble`.
        """
        try:
            events, self.trouble = self._tail.poll(limit), ""
        except OSError as error:
            self.trouble = error.strerror or str(error)
            return []
        if self._tail.restarted:
            self.model = DashboardModel()
            self._console = ConsoleTail(self.console_path, 0)
        self.model.consume_all(events)
        return events

    def read_all(self) -> None:
        """Take everything that is in the log by now."""
        self.poll()
        while self.behind and not self.trouble:
            self.poll()

    def console(self) -> list[str]:
        """Return the newest lines that the run printed."""
        return self._console.poll()

    def status(self, now: float) -> str:
        """Return "waiting", "live", "stale" or "ended"."""
        model = self.model
        if model.ended is not None:
            return "ended"
        if math.isnan(model.last_time):
            return "waiting"
        return "stale" if silent_for(model, now, STALE_SECONDS) else "live"

    def silence(self, now: float) -> float:
        """Return the seconds since the last event; NaN before the first."""
        return max(0.0, now - self.model.last_time)

    def sentence(self, now: float) -> str:
        """Return the status in words."""
        status, ended = self.status(now), self.model.ended
        words = f"{status}: last event {f.span(self.silence(now))} ago"
        if ended is not None:
            words = f"ended: {ended.reason} after {f.span(ended.seconds)}"
        elif status == "waiting":
            words = "waiting: no event yet"
        if self.trouble:
            words += f" (the log cannot be read now: {self.trouble})"
        return f"{self.name}: {words}, step {f.steps(self.model.step)}, {self.folder}"

    def to_json(self, now: float) -> dict[str, Any]:
        """Return the run's numbers and status as strict-JSON data."""
        silence = self.silence(now)
        known = silence if math.isfinite(silence) else None
        return {"folder": str(self.folder), "status": self.status(now), "silent_seconds": known} | self.model.to_json()


def find_run(folder: str | Path) -> Path:
    """Return the run's folder; the path of its event log means the same.

    Raises:
        ConfigError: There is no event log.
    """
    path = Path(folder)
    if path.name == EVENTS_FILE and path.is_file():
        return path.parent
    if (path / EVENTS_FILE).is_file():
        return path
    if not path.exists():
        raise ConfigError([f"there is no {path}: give the folder that the run got as log_dir"])
    inside = sorted(found.parent.name for found in path.glob(f"*/{EVENTS_FILE}"))
    if inside:
        listed = ", ".join(inside[:3]) + (f" and {len(inside) - 3} more" if len(inside) > 3 else "")
        raise ConfigError([f"{path} holds {listed}: give one of these folders, as {path / inside[-1]}"])
    raise ConfigError([f"{path} holds no {EVENTS_FILE}: give the folder that the run got as log_dir"])
