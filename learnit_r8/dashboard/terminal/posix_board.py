"""A POSIX terminal as a board: descriptors 1 and 2 in a file, and for the screen ncurses' cells and bytes as keys."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from learnit_r8.dashboard.drawing.cells import Grid
from learnit_r8.dashboard.terminal.board import Board, TerminalGone
from learnit_r8.dashboard.terminal.capture import Capture
from learnit_r8.dashboard.terminal.curses_screen import canvas
from learnit_r8.dashboard.terminal.guardian import Guardian, stty_form
from learnit_r8.dashboard.terminal.keyboard import KeyDecoder
from learnit_r8.dashboard.terminal.tty import Tty

_LEAVE_SECONDS = 0.3
_STUCK_SECONDS = 0.5
"""A terminal that takes nothing for so long is not waited for: what it was to show is in the console file."""
_PIECE = 4096


class PosixTerminal(Board):
    """A terminal whose modes stay the user's, its guardian, and the prints, where they are this process's to keep."""

    def __init__(self, console: Path | None, prints: bool = True) -> None:
        self._capture: Capture | None = None
        with contextlib.ExitStack() as undo:
            self.tty = Tty()
            undo.callback(self.tty.close)
            saved, (reset, ours) = stty_form(self.tty.fd), self._start()
            if prints:
                self.prints = self._capture = Capture(console)
                undo.callback(self._capture.close)
            self._guardian = Guardian(self.tty.fd, saved, ours, reset, self.prints)
            undo.callback(self._guardian.dismiss)
            self._undo = undo.pop_all()

    def _start(self) -> tuple[bytes, str]:
        """Start what draws, before prints are kept; return the bytes that leave the screen, and the view's modes."""
        return b"", stty_form(self.tty.fd)

    def checkpoint(self, path: str) -> None:
        self._guardian.checkpoint(path)

    def show_prints(self, last: bool = False) -> None:
        """Put on the terminal what was printed while it showed something else; `last`: nothing follows."""
        text = b"" if self.prints is None else self.prints.unshown(last)
        with contextlib.suppress(TerminalGone):
            while text:
                self.tty.send(text[:_PIECE], _STUCK_SECONDS)
                text = text[_PIECE:]
                if self.tty.congested:
                    self.tty.discard()
                    return

    def lend(self, last: bool = False) -> None:
        if self._capture is not None:
            self.show_prints()
            self._capture.release()
            self.show_prints(last)

    def reclaim(self) -> None:
        if self._capture is not None:
            self._capture.engage()

    def release(self) -> None:
        self.lend(last=True)
        self._undo.close()

    def abandon(self) -> None:
        # On a dead terminal prints would fail: they stay captured.
        self._undo.pop_all()
        self._guardian.dismiss()
        self.tty.close()

    def emergency(self) -> None:
        self.tty.muted = True  # the stuck thread may not touch the terminal any more
        if self._capture is not None:
            self._capture.release()
        self._guardian.dismiss()

    def forget(self) -> None:
        self._guardian.forget()
        self.tty.close()
        self._undo.pop_all()


class PosixBoard(PosixTerminal):
    """Owns the terminal while it is shown."""

    def __init__(self, environment: Mapping[str, str], console: Path | None, prints: bool) -> None:
        self._environment = environment
        self._keys = KeyDecoder()
        super().__init__(console, prints)

    def _start(self) -> tuple[bytes, str]:
        self._canvas = canvas(self._environment, self.tty.size())
        self.unicode = self._canvas.unicode
        self.tty.set_modes(self.tty.modes)
        try:
            return self._canvas.reset_bytes, stty_form(self.tty.fd)
        finally:
            self.tty.set_modes(self.tty.saved)

    def mine(self) -> bool:
        return self.tty.in_foreground()

    def lent_by_force(self) -> bool:
        return self.tty.taken() or self.tty.asked()

    def size(self) -> tuple[int, int]:
        return self.tty.size()

    def enter(self) -> None:
        self.tty.set_modes(self.tty.modes)
        self._guardian.tell("in")
        self._canvas.repaint()
        self.inputs = (self.tty.fd,)

    def pressed(self) -> Sequence[str]:
        data = self.tty.read()
        found = self._keys.feed(data) if data or not self._keys.waiting else self._keys.flush()
        self.unfinished_key = self._keys.waiting
        return found

    def draw(self, grid: Grid) -> None:
        self.tty.send(self._canvas.draw(grid))

    def ready(self) -> bool:
        self.tty.send(b"")
        return not self.tty.congested

    def repaint(self) -> None:
        self._canvas.repaint()

    def leave(self) -> None:
        farewell = self._canvas.finish()
        shown, self.inputs = self.inputs, ()
        if shown and self.tty.in_foreground():
            self.tty.unstop()
            self._bid(farewell, self.tty.saved)

    def _bid(self, farewell: bytes, modes: list[Any] | None) -> None:
        try:
            self.tty.send(farewell, _LEAVE_SECONDS)
        finally:
            self.tty.discard()
            if modes is not None:
                self.tty.set_modes(modes)
            self._guardian.tell("out")

    def step_aside(self, why: str) -> None:
        farewell, self.inputs = self._canvas.finish(), ()
        # Whoever asks for a line has set no modes: the user's own fit.
        self._bid(farewell + why.encode() + b"\r\n", None if self.tty.taken() else self.tty.saved)
        self.lend()

    def stop(self) -> None:
        """Stop the whole job, as the terminal would have done."""
        self.show_prints()
        os.killpg(os.getpgrp(), signal.SIGTSTP)
        # The stop takes effect within this nap; it ends after SIGCONT, and the next tick repaints.
        time.sleep(0.05)

    def emergency(self) -> None:
        super().emergency()
        # The terminal's descriptor stays open: its number must not be given to a file of the user's.
        if self.inputs and self.tty.in_foreground():
            self.tty.unstop()
            with contextlib.suppress(OSError):
                os.write(self.tty.fd, self._canvas.reset_bytes)
            self.tty.set_modes(self.tty.saved)
