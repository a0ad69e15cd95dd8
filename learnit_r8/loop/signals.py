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

    It is a context manager, entered by every loop that is running. Several runs may be in their loops at the same
    time: a signal is news for all of them, whichever is left first.

    Handlers can be set in the main thread only; elsewhere nothing is caught. A handler that the
    user has set is respected: it is called when the signal is delivered.

    Args:
        saves: Whether the run can be saved; decides what the user is told.
    """

    def __init__(self, *, saves: bool = True) -> None:
        self._plan = "saving a checkpoint" if saves else "stopping"
        self.pending: int | None = None
        self._outside: dict[int, Any] = {}  # the handlers that no run has set
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
        if self in _catching or threading.current_thread() is not threading.main_thread():
            return
        self._pid = os.getpid()
        _catching[:] = [run for run in _catching if run._pid == self._pid]  # after a fork the others are the parent's
        for number in _CAUGHT:
            outside = signal.getsignal(number)
            owner = getattr(outside, "__self__", None)
            if isinstance(owner, Interrupts):
                outside = owner._outside.get(number)
            # Ignored signals stay ignored (nohup); a handler set from C cannot be put back.
            if outside is not None and outside is not signal.SIG_IGN:
                self._outside[number] = outside
                signal.signal(number, self._on_signal)
        _catching.append(self)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.pending is None and self in _catching and os.getpid() == self._pid:
            for run in _catching:
                run.pending = number
            name = signal.Signals(number).name
            os.write(2, f"\n[r8] {name}: {self._plan} after this step; again to stop at once\n".encode())
            return
        for run in (self, *_catching):
            run.pending = None
        self._act(number, frame)

    def deliver(self, news: str) -> None:
        """Act on the signal that was kept, as if it had arrived now.

        Args:
            news: What has become of the run, one sentence: the text of the `KeyboardInterrupt`, or printed.
        """
        number, self.pending = self.pending, None
        if number is None:
            return
        self.release()
        if self._outside.get(number) is signal.default_int_handler:
            raise KeyboardInterrupt(news)
        os.write(2, f"[r8] {news}\n".encode())
        if any(run.pending == number for run in _catching):
            return  # another run is still to be saved: the last one acts
        self._act(number, sys._getframe())
        if self._loops:  # the user's handler has returned, and the loop goes on
            self.catch()

    def _act(self, number: int, frame: FrameType | None) -> None:
        outside = self._outside.get(number, signal.SIG_DFL)
        self.release()
        if callable(outside):
            outside(number, frame)
        else:
            for run in tuple(_catching):
                run.release()
            signal.raise_signal(number)

    def release(self) -> None:
        """Put the former handlers back."""
        if self not in _catching or threading.current_thread() is not threading.main_thread():
            return
        _catching.remove(self)
        for number, outside in self._outside.items():
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, _catching[-1]._on_signal if _catching else outside)


_catching: list[Interrupts] = []
"""The runs that catch signals now; the handlers that are set are the last one's."""
