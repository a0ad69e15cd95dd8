"""What the dashboard's thread asks of a display, and how a display says that it is over."""

from __future__ import annotations

import importlib.util
import select
from collections.abc import Sequence

from learnit_r8.events import Event
from learnit_r8.run.model import DashboardModel

POSIX = importlib.util.find_spec("termios") is not None and hasattr(select, "poll")
"""The system has POSIX terminals and can wait for descriptors: everything but Windows."""


class Detach(Exception):  # noqa: N818 - a wish of the user's, no error
    """The user closed the view; training goes on."""


class TerminalGone(Exception):  # noqa: N818 - a state of the world
    """The terminal hung up: its window was closed or the connection was lost."""


class Display:
    """One way of showing a run.

    Built by the thread that opens the dashboard, then driven by the dashboard's own thread. An exception from `tick`
    makes the dashboard take the next simpler one. Whoever holds nothing overrides `tick` only.
    """

    name: str

    @property
    def inputs(self) -> tuple[int, ...]:
        """Descriptors whose input should end the wait between two ticks."""
        return ()

    def due(self) -> bool:
        """Return whether the next `tick` has a use for what happened; until then events may wait, which is cheaper."""
        return True

    def tick(self, model: DashboardModel, fresh: Sequence[Event], now: float) -> float:
        """Take input, draw if it is time, and return the seconds until the next call.

        Args:
            model: The run's numbers, `fresh` included.
            fresh: Events since the last call.
            now: Wall-clock time.
        """
        raise NotImplementedError

    def leave(self) -> None:
        """Give the screen back; the next `tick` takes it again. Never waits longer than half a second."""

    def lend(self) -> None:
        """After `leave`, from the thread that wants to talk to the user: let its prints reach the terminal."""

    def reclaim(self) -> None:
        """End `lend`."""

    def release(self, gone: bool = False) -> None:
        """After `leave`: give everything else back. `gone`: the terminal hung up."""

    def emergency(self) -> None:
        """The thread is stuck somewhere: restore what the user needs, from another thread and without waiting."""

    def forget(self) -> None:
        """In a forked child: close what belongs to the parent, and touch nothing that is shared with it."""
