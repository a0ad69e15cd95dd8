"""What the screen draws on and takes keys from: one interface, a POSIX terminal and a Windows console behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from learnit_r8.dashboard.displays.display import POSIX
from learnit_r8.dashboard.drawing.cells import Grid
from learnit_r8.dashboard.terminal.capture import ConsoleFile


class Board:
    """A screen of cells, a keyboard, and the prints that are kept while it is shown.

    Built by the thread that opens the dashboard, on which it is not shown yet; then `tick`-ed by the dashboard's own.
    What takes a terminal may raise `tty.TerminalGone` when it hangs up.

    Attributes:
        prints: Where prints are kept; None where they are not this process's to keep.
        unicode: Other characters than ASCII can be shown.
        key_seconds: A key is looked for this often; None where it ends the wait by itself (`inputs`).
    """

    prints: ConsoleFile | None = None
    unicode = True
    key_seconds: float | None = None

    @property
    def inputs(self) -> tuple[int, ...]:
        """Descriptors whose input should end the wait between two frames."""
        return ()

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

    @property
    def unfinished_key(self) -> bool:
        """A key's bytes have begun to arrive."""
        return False

    def draw(self, grid: Grid) -> None:
        """Show a frame."""
        raise NotImplementedError

    @property
    def congested(self) -> bool:
        """The last frame still waits for the terminal; another try to send it was made."""
        return False

    def repaint(self) -> None:
        """Draw every cell with the next frame."""

    def leave(self) -> None:
        """Give the screen back; never waits longer than half a second."""
        raise NotImplementedError

    def stop(self) -> None:
        """After `leave`: stop this process as Ctrl-Z does."""

    def lend(self) -> None:
        """After `leave`: put on the terminal what was printed meanwhile, and let prints reach it."""

    def step_aside(self, why: str) -> None:
        """Leave the screen to a program that has taken it, whose modes stay, and say why."""

    def reclaim(self) -> None:
        """Keep prints again."""

    def release(self) -> None:
        """After `leave`: as `lend`, for good."""

    def abandon(self) -> None:
        """The terminal is gone: drop what belongs to it."""

    def emergency(self) -> None:
        """Restore what the user needs, from another thread and without waiting."""

    def forget(self) -> None:
        """In a forked child: close what belongs to the parent."""

    def checkpoint(self, path: str) -> None:
        """Take note of the newest checkpoint, for the last words."""


def open_board(environment: Mapping[str, str], console: Path | None, prints: bool) -> Board:
    """Return this system's board; call it from the main thread.

    Args:
        environment: For TERM, NO_COLOR and the like.
        console: File for the prints; a temporary one when None.
        prints: Keep this process's prints.

    Raises:
        OSError: There is no terminal, or no place for the console file.
    """
    if not POSIX:
        from learnit_r8.dashboard.terminal.windows_board import WindowsBoard

        return WindowsBoard(environment, console, prints)
    from learnit_r8.dashboard.terminal.posix_board import PosixBoard

    return PosixBoard(environment, console, prints)
