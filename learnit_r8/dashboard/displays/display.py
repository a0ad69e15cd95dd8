"""What the dashboard's thread asks of a display."""

from __future__ import annotations

from collections.abc import Sequence

from learnit_r8.dashboard.terminal.board import Board
from learnit_r8.events import Event
from learnit_r8.run.model import DashboardModel


class Detach(Exception):  # noqa: N818 - a wish of the user's, no error
    """The user closed the view; training goes on."""


class Display:
    """One way of showing a run; as it stands here, none: "off".

    Built by the thread that opens the dashboard, then driven by the dashboard's own thread. An exception from `tick`
    makes the dashboard take the next simpler one.

    Attributes:
        name: What `ui=` calls it.
        board: What it holds of the terminal, from its construction on.
    """

    name = "off"
    board = Board()

    def due(self) -> bool:
        """Return whether the next `tick` has a use for what happened; until then events may wait, which is cheaper."""
        return True

    def whole(self) -> bool:
        """Return whether it will show more than how far the run is: until then statistics may wait, too."""
        return True

    def tick(self, model: DashboardModel, fresh: Sequence[Event], now: float) -> float:
        """Take input, draw if it is time, and return the seconds until the next call; the model has `fresh`."""
        return 1.0

    def leave(self) -> None:
        """Give the screen back; the next `tick` takes it again. Never waits longer than half a second."""
