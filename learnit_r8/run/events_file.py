"""The event log of a run: strict JSON lines for `r8 watch`, reports and people with grep."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from learnit_r8.errors import tell
from learnit_r8.events import BatchIssued, Event
from learnit_r8.run.blocks import MOST, ROUTINE, decode, each_event, encode, encode_block, ends_block


class JsonlSink:
    """Appends events to a file: at once, but for what comes at every step, which waits for others for a second at most.

    Args:
        path: The file; its folder is made when something is written first.
        flush_every: So many steps wait at most.
    """

    ignores_batches = patient = True

    def __init__(self, path: str | Path, flush_every: int = 256) -> None:
        self.path = Path(path).absolute()  # programs change their working directory
        self._flush_every = min(flush_every, MOST)
        self._file: BinaryIO | None = None
        self._waiting: list[Event] = []
        self._flushed = math.nan

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a JsonlSink writes one file from one process: make one for each of them, or read the file")

    def record(self, event: Event) -> None:
        """Take one event. `BatchIssued` is left out: `LossReported` tells the same and more."""
        if type(event) in ROUTINE:
            self._waiting.append(event)
            full = len(self._waiting) >= self._flush_every or abs(event.time - self._flushed) > 1
            if full or ends_block(event):
                self._write(event.time)
            elif self._flushed != self._flushed:
                self._flushed = event.time
        elif type(event) is not BatchIssued:
            self._write(event.time, encode(event))

    def _write(self, time: float, line: str = "") -> None:
        """Write what waits, and a line, as one piece: a process that is killed leaves whole lines."""
        waiting, self._waiting, self._flushed = self._waiting, [], time
        text = (encode_block(waiting) + line if waiting else line).encode()
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = b"\n" + text if _broken(self.path) else text
            self._file = open(self.path, "ab", opener=_movable)  # noqa: SIM115
        self._file.write(text)
        self._file.flush()
        if not self.path.exists():
            self.close()  # the next event makes it anew
            tell(f"{self.path} was deleted while the run writes to it: its events so far are lost, later ones follow")

    def close(self) -> None:
        """Write what waits, and close; a later event opens the file again."""
        if self._waiting:
            self._write(self._waiting[-1].time)
        if self._file is not None:
            self._file.close()
            self._file = None


def _broken(path: Path) -> bool:
    """Return whether a file ends amid a line, as a full disk or a machine that went down leaves one."""
    if not path.exists() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def _movable(path: str, flags: int) -> int:
    """Open a file such that a later run can rename it while it is open; only Windows has to be asked for that."""
    if os.name != "nt":
        return os.open(path, flags, 0o666)
    windows: Any = importlib.import_module("_winapi")
    share, append, always, plain = 7, 0x4, 4, 0x80  # read, write and delete; FILE_APPEND_DATA; OPEN_ALWAYS; normal
    handle = windows.CreateFile(path, append, share, 0, always, plain, 0)
    return int(importlib.import_module("msvcrt").open_osfhandle(handle, flags))


def read_events(path: str | Path) -> Iterator[Event]:
    """Yield the events of a log file; a last line that is not complete yet is left out.

    Unknown events (of a newer version) and lines broken by a crash are passed over.
    """
    with Path(path).open("rb") as file:
        yield from each_event(decode(line for line in file if line.endswith(b"\n")))
