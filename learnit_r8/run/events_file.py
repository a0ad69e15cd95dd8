"""One strict-JSON line per event, for `r8 watch`, reports and people with grep."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from learnit_r8.errors import tell
from learnit_r8.events import BatchIssued, Event, LossReported, parse_line, to_json


class JsonlSink:
    """Appends events to a file; losses are buffered for a second at most, everything else is flushed at once.

    Args:
        path: The file; its folder is made at the first event.
        flush_every: Buffered loss lines before a flush.
    """

    ignores_batches = True

    def __init__(self, path: str | Path, flush_every: int = 100) -> None:
        self.path = Path(path).absolute()  # programs change their working directory
        self._flush_every = flush_every
        self._file: TextIO | None = None
        self._buffered = 0
        self._flushed = 0.0

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a JsonlSink writes one file from one process: make one for each of them, or read the file")

    def record(self, event: Event) -> None:
        """Write one line. `BatchIssued` is left out: `LossReported` tells the same and more."""
        if isinstance(event, BatchIssued):
            return
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a", encoding="utf-8", opener=_movable)  # noqa: SIM115
            self._flushed = event.time
        self._file.write(json.dumps(to_json(event), allow_nan=False, separators=(",", ":")) + "\n")
        self._buffered += 1
        waited = event.time - self._flushed
        if self._buffered >= self._flush_every or abs(waited) > 1 or not isinstance(event, LossReported):
            self._file.flush()
            self._buffered, self._flushed = 0, event.time
            if not self.path.exists():
                self.close()  # the next event makes it anew
                tell(
                    f"{self.path} was deleted while the run writes to it: its events so far are lost, later ones follow"
                )

    def close(self) -> None:
        """Flush and close; a later event opens the file again."""
        if self._file is not None:
            self._file.close()
            self._file = None


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
        for line in file:
            if line.endswith(b"\n") and (event := parse_line(line)) is not None:
                yield event
