"""The debugger behind `breakpoint()`, apart because importing `pdb` takes as long as starting the screen."""

from __future__ import annotations

import contextlib
import pdb
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from learnit_r8.dashboard.hooks import Suspend


class ScreenPdb(pdb.Pdb):
    """The debugger, which takes the terminal when it stops and gives it back on `continue` and `quit`.

    Args:
        suspend: Makes a context manager that gives the terminal to the user.
    """

    def __init__(self, suspend: Suspend) -> None:
        super().__init__()
        self._suspend = suspend
        self._stack = contextlib.ExitStack()
        self._talking = False

    def interaction(self, frame: FrameType | None, traceback: TracebackType | None) -> None:
        """Talk to the user; overrides `pdb.Pdb.interaction`."""
        if not self._talking:
            self._talking = True
            self._stack.enter_context(self._suspend())
        super().interaction(frame, traceback)

    def set_continue(self) -> None:
        """Run on; overrides `bdb.Bdb.set_continue`."""
        super().set_continue()
        self._give_back()

    def set_quit(self) -> None:
        """Stop debugging; overrides `bdb.Bdb.set_quit`."""
        super().set_quit()
        self._give_back()

    def _give_back(self) -> None:
        if self._talking:
            self._talking = False
            self._stack.close()
