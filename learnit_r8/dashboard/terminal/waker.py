"""Ends the wait of the dashboard's thread: a pipe beside the keyboard on POSIX systems, an event on Windows."""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Sequence

from learnit_r8.dashboard.terminal.board import POSIX


class Waker:
    """Waits for time to pass, for `wake`, or for input."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._reader = self._writer = -1
        if POSIX:
            self._reader, self._writer = os.pipe()
            os.set_blocking(self._reader, False)
            os.set_blocking(self._writer, False)

    def wait(self, seconds: float, inputs: Sequence[int] = ()) -> None:
        """Wait so long at most; input on one of the descriptors ends it too, on POSIX systems."""
        if not POSIX:
            self._event.wait(seconds)
            self._event.clear()
        else:
            poller = select.poll()
            for fd in (self._reader, *inputs):
                poller.register(fd, select.POLLIN)
            if any(fd == self._reader for fd, _ in poller.poll(seconds * 1000)):
                os.read(self._reader, 64)

    def wake(self) -> None:
        """End the wait, from any thread."""
        self._event.set()
        with contextlib.suppress(OSError):
            if self._writer >= 0:
                os.write(self._writer, b".")

    def close(self) -> None:
        """Close what it holds."""
        for fd in {self._reader, self._writer} - {-1}:
            with contextlib.suppress(OSError):
                os.close(fd)
