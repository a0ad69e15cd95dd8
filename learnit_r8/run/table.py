"""A whole event log at once: what comes at each step as columns, the other events as they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learnit_r8.events import BackupTaken, Event, LossReported, MetricLogged, RunStarted
from learnit_r8.run.blocks import Block, decode
from learnit_r8.run.tail import LineTail

_BLOCK = 8 << 20
_COLUMNS = ("step", "time", "loss", "lr", "size", "step_seconds", "r8_seconds")


@dataclass(frozen=True, slots=True, eq=False)
class EventsTable:
    """A run's log. Columns have one entry a reported step, in the order of the log."""

    # float64 `[n]` each: time (seconds since the Unix epoch), step, loss, lr, size (samples), step_seconds,
    # r8_seconds
    columns: dict[str, NDArray[np.float64]]
    metrics: dict[str, NDArray[np.float64]]  # the user's own numbers: name -> rows of step, time and value, `[3, n]`
    backups: float  # seconds that copies to RAM took
    others: list[Event]  # every other event
    abandoned: int  # steps that a resume took back; they are in no column

    def __len__(self) -> int:
        return len(self.columns["step"])


class _Rows:
    """A matrix to which columns are appended; rows are float64 and lie together."""

    def __init__(self, rows: int) -> None:
        self._room = np.empty((rows, 1024))
        self._used = 0

    def append(self, more: NDArray[Any]) -> None:
        end = self._used + more.shape[1]
        if end > self._room.shape[1]:
            room = np.empty((len(self._room), max(end, 2 * self._room.shape[1])))
            room[:, : self._used] = self.filled
            self._room = room
        self._room[:, self._used : end] = more
        self._used = end

    @property
    def filled(self) -> NDArray[np.float64]:
        return self._room[:, : self._used]


def read_table(path: str | Path) -> EventsTable:
    """Return a whole log as a table; broken lines and a last line without an end are left out."""
    return LogReader(path).poll()


class LogReader:
    """A log read again and again while it grows: each `poll` reads only what was added.

    Another file under the same name is read from its start. `changed`: the last `poll` found something new.
    """

    def __init__(self, path: str | Path) -> None:
        self._tail = LineTail(path)
        self.changed = False
        self._clear()

    def _clear(self) -> None:
        self._steps = _Rows(len(_COLUMNS))
        self._metrics: dict[str, _Rows] = {}
        self._others: list[Event] = []
        self._abandoned, self._backups = 0, 0.0

    def poll(self) -> EventsTable:
        """Return the log as it is now."""
        self.changed, behind = False, True
        while behind:
            lines, behind = self._tail.read(_BLOCK), self._tail.behind
            if self._tail.restarted:
                self._clear()
            if lines:
                self.changed = True
                for found in decode(lines.split(b"\n")):
                    self._take(found)
        columns = dict(zip(_COLUMNS, self._steps.filled, strict=True))
        metrics = {name: rows.filled for name, rows in self._metrics.items()}
        return EventsTable(columns, metrics, self._backups, list(self._others), self._abandoned)

    def _take(self, found: Event | Block) -> None:
        if not isinstance(found, Block):
            if isinstance(found, RunStarted) and found.resumed:
                self._take_back(found.step)
            self._others.append(found)
            return
        if steps := found.columns.get(LossReported):
            self._steps.append(np.array([steps[name] for name in _COLUMNS]))
        if backups := found.columns.get(BackupTaken):
            self._backups += float(np.sum(backups["seconds"]))
        if metrics := found.columns.get(MetricLogged):
            rows, names = np.array([metrics["step"], metrics["time"], metrics["value"]]), np.array(metrics["name"])
            for name in dict.fromkeys(metrics["name"]):
                self._metrics.setdefault(str(name), _Rows(3)).append(rows[:, names == name])

    def _take_back(self, step: int) -> None:
        """Forget the steps that a resume does again."""
        steps = self._steps.filled
        kept = steps[:, steps[0] < step]
        self._abandoned += steps.shape[1] - kept.shape[1]
        self._steps = _Rows(len(_COLUMNS))
        self._steps.append(kept)
