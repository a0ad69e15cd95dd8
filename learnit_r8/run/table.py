"""A whole event log at once: the reports of every step as columns, the other events as they are.

A million steps are 260 MB of JSON. Parsed line by line they take a minute of a report's ten seconds; so the lines of
`LossReported`, whose form `JsonlSink` fixes, are matched a block at a time, and only a block that holds one of another
form is parsed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from learnit_r8.events import Event, LossReported, RunStarted, parse_line
from learnit_r8.run.tail import LineTail

_BLOCK = 8 << 20
_COLUMNS = ("time", "step", "loss", "lr", "size", "step_seconds", "r8_seconds")
_MARK = b'{"event":"LossReported",'
_RUN_MARK = b'\n{"event":"RunStarted",'
_FIELDS = (f'"{f.name}":' + ('"?([^,"}]+)"?' if f.name in _COLUMNS else "[^,}]+") for f in fields(LossReported))
_LINE = re.compile(f'^{{"event":"LossReported",{",".join(_FIELDS)}}}$'.encode(), re.MULTILINE)
"""A line as `to_json` writes it, with a group for each column; `"?`: numbers that are not finite travel as strings."""


@dataclass(frozen=True, slots=True, eq=False)
class EventsTable:
    """A run's log. Columns have one entry a reported step, in the order of the log."""

    # float64 `[n]` each: time (seconds since the Unix epoch), step, loss, lr, size (samples), step_seconds,
    # r8_seconds
    columns: dict[str, NDArray[np.float64]]
    others: list[Event]  # every other event
    abandoned: int  # steps that a resume took back; they are in no column

    def __len__(self) -> int:
        return len(self.columns["step"])


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
        self._parts: list[NDArray[np.float64]] = []
        self._others: list[Event] = []
        self._abandoned = 0

    def poll(self) -> EventsTable:
        """Return the log as it is now."""
        self.changed, behind = False, True
        while behind:
            block, behind = self._tail.read(_BLOCK), self._tail.behind
            if self._tail.restarted:
                self._clear()
            if block:
                self.changed = True
                self._take(block)
        table = np.concatenate(self._parts) if self._parts else np.empty((0, len(_COLUMNS)))
        self._parts = [table]
        columns = {name: table[:, i] for i, name in enumerate(_COLUMNS)}
        return EventsTable(columns, list(self._others), self._abandoned)

    def _take(self, block: bytes) -> None:
        for piece in _at_starts(block):
            reports, more = _parse(piece)
            if more and isinstance(more[0], RunStarted) and more[0].resumed:  # it takes the later steps back
                kept = [part[part[:, 1] < more[0].step] for part in self._parts]
                self._abandoned += sum(map(len, self._parts)) - sum(map(len, kept))
                self._parts = kept
            self._others += more
            self._parts.append(reports)


def _at_starts(block: bytes) -> list[bytes]:
    """Cut a block before each RunStarted."""
    pieces, start = [], 0
    while (end := block.find(_RUN_MARK, start)) >= 0:
        pieces.append(block[start:end])
        start = end + 1
    return [*pieces, block[start:]]


def _parse(block: bytes) -> tuple[NDArray[np.float64], list[Event]]:
    lines = block.split(b"\n")
    reports = _match(block)
    if reports is not None:
        lines = [line for line in lines if not line.startswith(_MARK)]
    others, more = [], []
    for line in lines:
        event = parse_line(line)
        if isinstance(event, LossReported):
            more.append([getattr(event, name) for name in _COLUMNS])
        elif event is not None:
            others.append(event)
    if reports is None:
        reports = np.array(more, np.float64).reshape(len(more), len(_COLUMNS))
    return reports, others


def _match(block: bytes) -> NDArray[np.float64] | None:
    """Return the reports of a block whose every report has the usual form; None for another block."""
    found = _LINE.findall(block)
    if len(found) != block.count(_MARK):
        return None
    try:
        # The longest number that JSON writes has 24 characters.
        reports = np.array(found, dtype="S32").astype(np.float64)
    except ValueError:  # digits that are none
        return None
    return reports.reshape(len(found), len(_COLUMNS))
