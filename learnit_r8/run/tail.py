"""A run's event log read while it grows, or all at once."""

from __future__ import annotations

import os
from pathlib import Path

from learnit_r8.events import Event, parse_line

EVENTS_FILE = "events.jsonl"
CONSOLE_FILE = "console.log"
CHUNK = 4 << 20
"""Bytes that one `poll` reads at most: about 16 000 events, a tenth of a second."""


class EventTail:
    """The events that were appended since the last call.

    Args:
        path: The log. It may appear later, grow, and be replaced by a new one.

    Attributes:
        behind: The last `poll` stopped before the end of the file.
        restarted: The file is another one, or has become shorter: the last `poll` returned its first events.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.behind = self.restarted = False
        self._offset = 0
        self._partial = b""
        self._inode: int | None = None

    def poll(self, limit: int = CHUNK) -> list[Event]:
        """Return the events of the next `limit` bytes; a line that is not complete yet is held back.

        Unknown events (of a newer version) and lines broken by a crash are passed over.

        Raises:
            OSError: The file exists and cannot be read.
        """
        self.behind = self.restarted = False
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                size = status.st_size
                if size < self._offset or status.st_ino != (self._inode or status.st_ino):
                    self._offset, self._partial, self.restarted = 0, b"", True
                self._inode = status.st_ino
                file.seek(self._offset)
                data = file.read(limit)
        except FileNotFoundError:
            return []
        self._offset += len(data)
        self.behind = self._offset < size
        *lines, self._partial = (self._partial + data).split(b"\n")
        return [event for event in map(parse_line, lines) if event is not None]
