"""What a display holds of a terminal, a POSIX one or a Windows console, and what wakes the thread that drives it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import select
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from learnit_r8.dashboard.terminal.capture import ConsoleFile

if TYPE_CHECKING:
    from learnit_r8.dashboard.terminal.posix_board import PosixBoard
    from learnit_r8.dashboard.terminal.windows_board import WindowsBoard

    ScreenBoard: TypeAlias = "PosixBoard | WindowsBoard"

POSIX = importlib.util.find_spec("termios") is not None and hasattr(select, "poll")
"""The system has POSIX terminals and can wait for descriptors: everything but Windows."""


class TerminalGone(Exception):  # noqa: N818 - a state of the world
    """The terminal hung up: its window was closed or the connection was lost."""


class Board:
    """What has to be given back, and the prints that are kept meanwhile; as it stands here, nothing.

    One that is a screen is built by the thread that opens the dashboard, on which it is not shown yet, then driven by
    the dashboard's own. It has `size`, `enter` (the next frame is drawn whole), `pressed` (names of keys, without
    waiting), `draw`, `repaint` (each cell, with the next frame) and `leave`, which never waits longer than half a
    second. What takes a terminal may raise `TerminalGone`.

    Attributes:
        prints: Where prints are kept; None where they are not this process's to keep.
        inputs: Descriptors whose input should end the wait between two frames.
        unicode: Other characters than ASCII can be shown.
        key_seconds: A key is looked for this often; None where it ends the wait by itself (`inputs`).
        unfinished_key: A key's bytes have begun to arrive.
    """

    prints: ConsoleFile | None = None
    inputs: tuple[int, ...] = ()
    unicode = True
    key_seconds: float | None = None
    unfinished_key = False

    def checkpoint(self, path: str) -> None:
        """Take note of the newest checkpoint, for the last words."""

    def lend(self) -> None:
        """With the display left: put on the terminal what was printed meanwhile, and let prints reach it."""

    def reclaim(self) -> None:
        """End `lend`."""

    def release(self) -> None:
        """As `lend`, for good."""

    def abandon(self) -> None:
        """The terminal is gone: drop what belongs to it."""

    def emergency(self) -> None:
        """The display's thread is stuck: restore what the user needs, from another one and without waiting."""

    def forget(self) -> None:
        """In a forked child: close what belongs to the parent, and touch nothing that is shared with it."""

    def mine(self) -> bool:
        """Return whether it may be drawn on now."""
        return True

    def lent_by_force(self) -> bool:
        """Return whether another program has taken the terminal for itself, without asking."""
        return False

    def ready(self) -> bool:
        """Return whether the last frame has reached the terminal; what still waits is tried again."""
        return True

    def stop(self) -> None:
        """After `leave`: stop this process as Ctrl-Z does."""

    def step_aside(self, why: str) -> None:
        """Leave the screen to a program that has taken it, whose modes stay, and say why."""


def open_board(environment: Mapping[str, str], console: Path | None, prints: bool) -> ScreenBoard:
    """Return this system's screen; call it from the main thread. `prints`: keep this process's prints.

    Raises:
        OSError: There is no terminal, or no place for the console file.
    """
    if not POSIX:
        from learnit_r8.dashboard.terminal.windows_board import WindowsBoard

        return WindowsBoard(environment, console, prints)
    from learnit_r8.dashboard.terminal.posix_board import PosixBoard

    return PosixBoard(environment, console, prints)


class Waker:
    """Waits for time to pass, for `wake`, or for input: a pipe beside the keyboard on POSIX systems, else an event."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._pipe: tuple[int, ...] = os.pipe() if POSIX else ()
        for fd in self._pipe:
            os.set_blocking(fd, False)

    def wait(self, seconds: float, inputs: Sequence[int] = ()) -> None:
        """Wait so long at most; input on one of the descriptors ends it too, on POSIX systems."""
        if not POSIX:
            self._event.wait(seconds)
            self._event.clear()
            return
        reader, poller = self._pipe[0], select.poll()
        for fd in (reader, *inputs):
            poller.register(fd, select.POLLIN)
        if any(fd == reader for fd, _ in poller.poll(seconds * 1000)):
            os.read(reader, 64)

    def wake(self) -> None:
        self._event.set()
        with contextlib.suppress(OSError):
            for writer in self._pipe[1:]:
                os.write(writer, b".")

    def close(self) -> None:
        for fd in self._pipe:
            with contextlib.suppress(OSError):
                os.close(fd)
