"""What asks the run to stop (Ctrl-C, SIGTERM, SIGUSR1, a lost terminal, ...) waits for the next step boundary.

There the state can be saved. Then the signal acts as it would have done without us: the handler that was there before
is called (the user's, asyncio's, Lightning's, submitit's), or the process ends as that signal ends it.
"""

from __future__ import annotations

import _thread
import inspect
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from types import CodeType, FrameType
from typing import Any, Self

from learnit_r8.core.config import SIGNALS

_INSISTS = (signal.SIGINT, signal.SIGTERM)
"""Sent a second time, these act at once; others come twice by themselves (a lost terminal hangs up twice)."""


class Interrupts:
    """Catches signals and keeps them for the loop; Ctrl-C or SIGTERM a second time acts at once.

    It is a context manager, entered by every loop that is running. Several runs may be in their loops at the same
    time: a signal is news for all of them, whichever is left first. The last one to come to a boundary acts on it. One
    whose loop stands outside or beside this one's is waited for; any other, which an error may have thrown out of its
    loop while a traceback keeps that open, has until this one's next boundary.

    Handlers can be set in the main thread only; elsewhere nothing is caught. Where a loop is closed in another thread,
    the main one puts the handlers back as soon as it runs again.

    Args:
        saves: Whether the run can be saved; decides what the user is told.
        signals: Names of those to catch, without "SIG".
    """

    def __init__(self, *, saves: bool = True, signals: Iterable[str] = SIGNALS) -> None:
        self._plan = "saving a checkpoint" if saves else "stopping"
        self._numbers = tuple(getattr(signal, f"SIG{name}") for name in signals)
        self.pending: int | None = None
        self._also: list[int] = []  # other signals that came while one was pending
        self._came = False  # to a boundary with a signal, and gives others until the next one
        self._home: tuple[int, CodeType] | None = None  # the frame that the loop stands in; itself it would live on
        self._outside: dict[int, Any] = {}  # the handlers that no run has set
        self._pid = 0
        self._loops = 0

    def __enter__(self) -> Self:
        if self._loops == 0:
            self._home = next(_standing(sys._getframe(1)), None)
        self._loops += 1
        self.catch()
        return self

    def __exit__(self, *error: object) -> None:
        self._loops -= 1
        if self._loops == 0:
            self.release()

    def wanted(self) -> list[int]:
        """Return the signals that are caught, or will be as soon as a loop runs; none outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return []
        # Ignored signals stay ignored (nohup); a handler set from C cannot be put back.
        return [number for number in self._numbers if signal.getsignal(number) not in (signal.SIG_IGN, None)]

    def catch(self) -> None:
        """Set the handlers, once."""
        if self in _catching or threading.current_thread() is not threading.main_thread():
            return
        if _left_behind.pop(self, None) is not None:  # run again before the main thread had its turn
            self._put_back()
        self._pid, self._outside = os.getpid(), {}
        _catching[:] = [run for run in _catching if run._pid == self._pid]  # after a fork the others are the parent's
        for number in self.wanted():
            outside = signal.getsignal(number)
            owner = getattr(outside, "__self__", None)
            if isinstance(owner, Interrupts):
                outside = owner._outside.get(number)
            self._outside[number] = outside
            signal.signal(number, self._on_signal)
        _catching.append(self)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self in _left_behind:
            woken = _left_behind.pop(self)
            self._put_back()
            if number != woken:
                signal.raise_signal(number)
            return
        if self not in _catching or os.getpid() != self._pid:
            self._act(number, frame)
        elif self.pending is None:
            for run in _catching:
                if number in run._outside:
                    run.pending = number
            again = "; again to stop at once" if number in _INSISTS else ""
            say(f"\n[r8] {signal.Signals(number).name}: {self._plan} after this step{again}")
        elif number in _INSISTS and number in (self.pending, *self._also):
            for run in (self, *_catching):
                run._forget()
            self._act(number, frame)
        elif number not in (self.pending, *self._also):
            for run in _catching:
                if number in run._outside:
                    run._also.append(number)

    def deliver(self, news: str) -> None:
        """Act on the signals that were kept; `news` of the run is the `KeyboardInterrupt`'s text, or printed."""
        kept = [] if self.pending is None else [self.pending, *self._also]
        if not kept:
            return
        raises = [number for number in kept if self._outside.get(number) is signal.default_int_handler]
        missing = [run for run in _catching if run is not self and run.pending in kept and not run._came]
        if missing and not raises and not self._came:
            stack = set(_standing(sys._getframe()))
            if not any(run._home in stack for run in missing):
                self._came = True
                return
        acts = self._came or not missing
        for run in (self, *missing, *(run for run in _catching if run._came)):
            if run is self or acts:
                run._forget()
        self.release()
        if kept[0] not in raises:
            say(f"[r8] {news}")
        for number in kept:
            if number in raises:
                raise KeyboardInterrupt(news)
            if acts:  # else another run is still to be saved
                self._act(number, sys._getframe())
        if self._loops:  # the user's handler has returned, and the loop goes on
            self.catch()

    def _forget(self) -> None:
        self.pending, self._also, self._came = None, [], False

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
        if self not in _catching:
            return
        _catching.remove(self)
        if threading.current_thread() is threading.main_thread():
            self._put_back()
            return
        ours = [number for number in self._outside if signal.getsignal(number) == self._on_signal]
        if ours and os.getpid() == self._pid:
            _left_behind[self] = ours[0]
            _thread.interrupt_main(signal.Signals(ours[0]))  # there our handler puts the others back

    def _put_back(self) -> None:
        for number, outside in self._outside.items():
            if signal.getsignal(number) == self._on_signal:
                heirs = [run._on_signal for run in _catching if number in run._outside]
                signal.signal(number, heirs[-1] if heirs else outside)


def _standing(frame: FrameType | None) -> Iterator[tuple[int, CodeType]]:
    """Yield what tells the frames from others that are on the stack, but generators, which any frame may resume."""
    while frame is not None:
        if not frame.f_code.co_flags & inspect.CO_GENERATOR:
            yield id(frame), frame.f_code
        frame = frame.f_back


def say(line: str) -> None:
    """Write a line to standard error, if there is still anyone to read it: the terminal may be what was lost."""
    with suppress(OSError):
        os.write(2, f"{line}\n".encode())


_catching: list[Interrupts] = []
"""The runs that catch signals now; the handlers that are set are the last one's."""
_left_behind: dict[Interrupts, int] = {}
"""Runs that were released outside the main thread, and the signal that wakes it up to put the handlers back."""
