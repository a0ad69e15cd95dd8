"""A POSIX terminal as a board: ncurses' cells on it, its bytes as keys, descriptors 1 and 2 in a file."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from learnit_r8.dashboard.displays.display import TerminalGone
from learnit_r8.dashboard.drawing.cells import Grid
from learnit_r8.dashboard.terminal.board import Board
from learnit_r8.dashboard.terminal.capture import Capture
from learnit_r8.dashboard.terminal.curses_screen import canvas
from learnit_r8.dashboard.terminal.guardian import Guardian, stty_form
from learnit_r8.dashboard.terminal.keyboard import KeyDecoder
from learnit_r8.dashboard.terminal.tty import Tty

_LEAVE_SECONDS = 0.3
_STUCK_SECONDS = 0.5
"""A terminal that takes nothing for so long is not waited for: what it was to show is in the console file."""
_PIECE = 4096


class PosixBoard(Board):
    """Owns the terminal while it is shown.

    Args:
        environment: The process's environment variables.
        console: Where prints are kept; None for a temporary file.
        prints: Whether prints are this process's to keep.
    """

    def __init__(self, environment: Mapping[str, str], console: Path | None, prints: bool) -> None:
        self._keys = KeyDecoder()
        self._shown = False
        self._undo = contextlib.ExitStack()
        with contextlib.ExitStack() as undo:
            self._tty = Tty()
            undo.callback(self._tty.close)
            self._canvas = canvas(environment, self._tty.size())
            self.unicode = self._canvas.unicode
            self._capture = Capture(console) if prints else None
            self.prints = self._capture
            if self._capture is not None:
                undo.callback(self._capture.close)
            self._guardian = self._watch()
            undo.callback(self._guardian.dismiss)
            self._undo = undo.pop_all()

    def _watch(self) -> Guardian:
        """Start the guardian; it has to know both sets of modes as `stty` prints them."""
        saved, file = stty_form(self._tty.fd), self.prints
        self._tty.set_modes(self._tty.modes)
        try:
            ours, reset = stty_form(self._tty.fd), self._canvas.reset_bytes
            console, start = (file.path, file.start) if file is not None else (None, 0)
            return Guardian(self._tty.fd, saved, ours, reset, console, start)
        finally:
            self._tty.set_modes(self._tty.saved)

    @property
    def inputs(self) -> tuple[int, ...]:
        return (self._tty.fd,) if self._shown else ()

    def mine(self) -> bool:
        return self._tty.in_foreground()

    def lent_by_force(self) -> bool:
        return self._tty.taken() or self._tty.asked()

    def size(self) -> tuple[int, int]:
        return self._tty.size()

    def enter(self) -> None:
        self._tty.set_modes(self._tty.modes)
        self._guardian.tell("in")
        self._canvas.repaint()
        self._shown = True

    def pressed(self) -> Sequence[str]:
        data = self._tty.read()
        return self._keys.feed(data) if data or not self._keys.waiting else self._keys.flush()

    @property
    def unfinished_key(self) -> bool:
        return self._keys.waiting

    def draw(self, grid: Grid) -> None:
        self._tty.send(self._canvas.draw(grid))

    @property
    def congested(self) -> bool:
        self._tty.send(b"")
        return self._tty.congested

    def repaint(self) -> None:
        self._canvas.repaint()

    def leave(self) -> None:
        farewell = self._canvas.finish()
        shown, self._shown = self._shown, False
        if not shown or not self._tty.in_foreground():
            return
        self._tty.unstop()
        try:
            self._tty.send(farewell, _LEAVE_SECONDS)
        finally:
            self._tty.discard()
            self._tty.set_modes(self._tty.saved)
            self._guardian.tell("out")

    def stop(self) -> None:
        """Stop the whole job, as the terminal would have done."""
        self._replay()
        os.killpg(os.getpgrp(), signal.SIGTSTP)
        # The stop takes effect within this nap; it ends after SIGCONT, and the next tick repaints.
        time.sleep(0.05)

    def _replay(self, last: bool = False) -> None:
        """Put on the terminal what was printed while it showed something else."""
        text = b"" if self.prints is None else self.prints.unshown(last)
        with contextlib.suppress(TerminalGone):
            while text:
                self._tty.send(text[:_PIECE], _STUCK_SECONDS)
                text = text[_PIECE:]
                if self._tty.congested:
                    self._tty.discard()
                    return

    def lend(self) -> None:
        if self._capture is not None:
            self._replay()
            self._capture.release()
            self._replay()

    def step_aside(self, why: str) -> None:
        farewell, self._shown = self._canvas.finish(), False
        self._tty.send(farewell + why.encode() + b"\r\n", _LEAVE_SECONDS)
        self._tty.discard()
        if not self._tty.taken():  # whoever asks for a line has set no modes: the user's own fit
            self._tty.set_modes(self._tty.saved)
        self._guardian.tell("out")
        self.lend()

    def reclaim(self) -> None:
        if self._capture is not None:
            self._capture.engage()

    def release(self) -> None:
        if self._capture is not None:
            self._replay()
            self._capture.release()
            self._replay(last=True)
        self._undo.close()

    def abandon(self) -> None:
        # On a dead terminal prints would fail: they stay captured.
        self._undo.pop_all()
        self._guardian.dismiss()
        self._tty.close()

    def emergency(self) -> None:
        """Restore screen and modes by hand; the stuck thread may not touch the terminal any more."""
        self._tty.muted = True
        if self._capture is not None:
            self._capture.release()
        self._guardian.dismiss()
        # The terminal's descriptor stays open: its number must not be given to a file of the user's.
        if self._shown and self._tty.in_foreground():
            self._tty.unstop()
            with contextlib.suppress(OSError):
                os.write(self._tty.fd, self._canvas.reset_bytes)
            self._tty.set_modes(self._tty.saved)

    def forget(self) -> None:
        self._guardian.forget()
        self._tty.close()
        self._undo.pop_all()

    def checkpoint(self, path: str) -> None:
        self._guardian.checkpoint(path)
