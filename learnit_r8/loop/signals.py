"""Ctrl-C and SIGTERM wait for the next step boundary, where the state can be saved."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any, Self

_CAUGHT = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Catches the first signal and keeps it for the loop; a second one acts at once.

    It is a context manager, entered by every loop that is running.

    Handlers can be set in the main thread only; elsewhere nothing is caught. A handler that the
    user has set is respected: it is called when the signal is delivered.

    Args:
        saves: Whether the run can be saved; decides what the user is told.
    """

    def __init__(self, *, saves: bool = True) -> None:
        self._plan = "saving a checkpoint" if saves else "stopping"
        self.pending: int | None = None
        self._previous: dict[int, Any] = {}
        self._pid = 0
        self._loops = 0

    def __enter__(self) -> Self:
        self._loops += 1
        self.catch()
        return self

    def __exit__(self, *error: object) -> None:
        self._loops -= 1
        if self._loops == 0:
            self.release()

    def catch(self) -> None:
        """Set the handlers, once."""
        if self._previous or threading.current_thread() is not threading.main_thread():
            return
        self._pid = os.getpid()
        for number in _CAUGHT:
            previous = signal.getsignal(number)
            # Ignored signals stay ignored (nohup); a handler set from C cannot be put back.
            if previous is not None and previous is not signal.SIG_IGN:
                self._previous[number] = previous
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.pending is None and os.getpid() == self._pid:
            self.pending = number
            name = signal.Signals(number).name
            os.write(2, f"\n[r8] {name}: {self._plan} after this step; again to stop at once\n".encode())
            return
        self.pending = None
        self._deliver(number, frame)

    def deliver(self, news: str) -> None:
        """Act on the signal that was kept, as if it had arrived now.

        Args:
            news: What has become of the run, one sentence: the text of the `KeyboardInterrupt`, or printed.
        """
        number, self.pending = self.pending, None
        if number is None:
            return
        if self._previous.get(number) is signal.default_int_handler:
            self.release()
            raise KeyboardInterrupt(news)
        os.write(2, f"[r8] {news}\n".encode())
        self._deliver(number, sys._getframe())

    def _deliver(self, number: int, frame: FrameType | None) -> None:
        previous = self._previous.get(number, signal.SIG_DFL)
        self.release()
        if callable(previous):
            previous(number, frame)
        else:
            signal.raise_signal(number)

    def release(self) -> None:
        """Put the former handlers back."""
        if threading.current_thread() is not threading.main_thread():
            return
        while self._previous:
            number, previous = self._previous.popitem()
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, previous)
