"""A run's files read while they grow: its event log, and what it printed."""

from __future__ import annotations

import contextlib
import os
import re
from collections import deque
from pathlib import Path

from learnit_r8.events import Event
from learnit_r8.run.blocks import Block, decode

EVENTS_FILE = "events.jsonl"
CONSOLE_FILE = "console.log"
CHUNK = 4 << 20
"""Bytes that one `poll` reads at most: about 80 000 steps, a tenth of a second."""
ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
_CONSOLE_CHUNK = 1 << 20
_LONGEST = 65536
"""Bytes of an unfinished line that are kept."""


class LineTail:
    """The whole lines that were appended to a file since the last call.

    Args:
        path: The file. It may grow, and be replaced by a new one.
        start: Offset of the first byte that counts.

    Attributes:
        behind: The last `read` stopped before the end of the file.
        restarted: The file is another one, or has become shorter: the last `read` returned its first lines.
        partial: What stands there of a line that is not complete yet.
    """

    def __init__(self, path: str | Path, start: int = 0) -> None:
        self.path = Path(path)
        self.behind = self.restarted = False
        self.partial = b""
        self._offset = start
        self._inode: int | None = None

    def read(self, limit: int) -> bytes:
        """Return the lines among the next `limit` bytes; an OSError where there is no file, or it cannot be read."""
        self.behind = self.restarted = False
        with self.path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_size < self._offset or status.st_ino != (self._inode or status.st_ino):
                self._offset, self.partial, self.restarted = 0, b"", True
            self._inode = status.st_ino
            file.seek(self._offset)
            data = file.read(limit)
        self._offset += len(data)
        self.behind = self._offset < status.st_size
        data = self.partial + data
        end = data.rfind(b"\n") + 1
        self.partial = data[end:]
        return data[:end]


class EventTail(LineTail):
    """The events that were appended to a log, which may appear later."""

    def poll(self, limit: int = CHUNK) -> list[Event | Block]:
        """Return what the next `limit` bytes hold; a line that is not complete yet is held back."""
        try:
            return list(decode(self.read(limit).split(b"\n")))
        except FileNotFoundError:
            return []


class ConsoleTail:
    r"""The newest lines of a growing file, `\r` folded and escape sequences removed."""

    def __init__(self, path: Path, start: int = 0, keep: int = 1000) -> None:
        self._tail = LineTail(path, start)
        self._lines: deque[str] = deque(maxlen=keep)
        self.count = 0

    def poll(self) -> list[str]:
        """Read what was appended (1 MiB at most a call) and return the newest lines, the unfinished one last."""
        tail = self._tail
        with contextlib.suppress(OSError):
            if whole := tail.read(_CONSOLE_CHUNK):
                lines = whole.split(b"\n")[:-1]
                self.count += len(lines)
                # Only the last `keep` lines can ever be shown, so only they are decoded.
                self._lines.extend(map(fold, lines[-(self._lines.maxlen or 1) :]))
            tail.partial = tail.partial[-_LONGEST:]
        unfinished = [fold(tail.partial)] if tail.partial.strip() else []
        return [*self._lines, *unfinished]


def fold(line: bytes) -> str:
    r"""Return what a terminal would show of one line: the last state after `\r`, no escapes, tabs as spaces.

    >>> fold(b" 36%|###\r 37%|####\r")
    ' 37%|####'
    """
    text = ESCAPES.sub("", line.decode("utf-8", "replace")).rstrip("\r")
    shown = text.rsplit("\r", 1)[-1]
    return "".join(char for char in shown.expandtabs() if char >= " " and char != "\x7f")
