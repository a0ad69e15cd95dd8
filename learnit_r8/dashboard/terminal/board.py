"""What a display holds of a terminal: one interface, a POSIX terminal and a Windows console behind it."""

from __future__ import annotations

import importlib.util
import select
from collections.abc import Mapping, Sequence
from pathlib import Path

from learnit_r8.dashboard.drawing.cells import Grid
from learnit_r8.dashboard.terminal.capture import ConsoleFile

POSIX = importlib.util.find_spec("termios") is not None and hasattr(select, "poll")
"""The system has POSIX terminals and can wait for descriptors: everything but Windows."""


class TerminalGone(Exception):  # noqa: N818 - a state of the world
    """The terminal hung up: its window was closed or the connection was lost."""


class Board:
    """What has to be given back, and the prints that are kept meanwhile; as it stands here, nothing.

    Attributes:
        prints: Where prints are kept; None where they are not this process's to keep.
        inputs: Descriptors whose input should end the wait between two frames.
    """

    prints: ConsoleFile | None = None
    inputs: tuple[int, ...] = ()

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


class ScreenBoard(Board):
    """A screen of cells and a keyboard.

    Built by the thread that opens the dashboard, on which it is not shown yet; then driven by the dashboard's own.
    What takes a terminal may raise `TerminalGone`.

    Attributes:
        unicode: Other characters than ASCII can be shown.
        key_seconds: A key is looked for this often; None where it ends the wait by itself (`inputs`).
        unfinished_key: A key's bytes have begun to arrive.
    """

    unicode = True
    key_seconds: float | None = None
    unfinished_key = False

    def mine(self) -> bool:
        """Return whether it may be drawn on now."""
        return True

    def lent_by_force(self) -> bool:
        """Return whether another program has taken the terminal for itself, without asking."""
        return False

    def size(self) -> tuple[int, int]:
        """Return columns and rows."""
        raise NotImplementedError

    def enter(self) -> None:
        """Show the screen; the next frame is drawn whole."""
        raise NotImplementedError

    def pressed(self) -> Sequence[str]:
        """Return the names of the keys pressed so far, without waiting."""
        raise NotImplementedError

    def ready(self) -> bool:
        """Return whether the last frame has reached the terminal; what still waits is tried again."""
        return True

    def draw(self, grid: Grid) -> None:
        """Show a frame."""
        raise NotImplementedError

    def repaint(self) -> None:
        """Draw every cell with the next frame."""
        raise NotImplementedError

    def leave(self) -> None:
        """Give the screen back; never waits longer than half a second."""
        raise NotImplementedError

    def stop(self) -> None:
        """After `leave`: stop this process as Ctrl-Z does."""

    def step_aside(self, why: str) -> None:
        """Leave the screen to a program that has taken it, whose modes stay, and say why."""


def open_board(environment: Mapping[str, str], console: Path | None, prints: bool) -> ScreenBoard:
    """Return this system's board; call it from the main thread. `prints`: keep this process's prints.

    Raises:
        OSError: There is no terminal, or no place for the console file.
    """
    if not POSIX:
        from learnit_r8.dashboard.terminal.windows_board import WindowsBoard

        return WindowsBoard(environment, console, prints)
    from learnit_r8.dashboard.terminal.posix_board import PosixBoard

    return PosixBoard(environment, console, prints)
