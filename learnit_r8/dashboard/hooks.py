"""Moments at which the user must see the terminal: `input()`, `breakpoint()`, and a traceback."""

from __future__ import annotations

import builtins
import os
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

Suspend = Callable[[], AbstractContextManager[None]]
"""Makes a context manager that gives the terminal to the user."""


class TalkHooks:
    """Wraps `input`, `breakpoint` and `sys.excepthook` until `remove`.

    Args:
        suspend: Context manager that gives the terminal to the user.
        close: Called before a traceback is printed, so that it lands on the normal screen.
    """

    def __init__(self, suspend: Suspend, close: Callable[[], None]) -> None:
        self._suspend, self._close = suspend, close
        self._pid = os.getpid()
        self._input, self._breakpoint, self._except = builtins.input, sys.breakpointhook, sys.excepthook
        builtins.input, sys.breakpointhook, sys.excepthook = self._ask, self._debug, self._report

    def remove(self) -> None:
        """Put back what was there, where nobody has replaced it since."""
        if builtins.input == self._ask:
            builtins.input = self._input
        if sys.breakpointhook == self._debug:
            sys.breakpointhook = self._breakpoint
        if sys.excepthook == self._report:
            sys.excepthook = self._except

    def _ask(self, prompt: object = "", /) -> str:
        with self._suspend():
            return self._input(prompt)

    def _debug(self, *args: Any, **kwargs: Any) -> Any:
        chosen = os.environ.get("PYTHONBREAKPOINT", "")
        mine = os.getpid() == self._pid and threading.current_thread() is threading.main_thread()
        if not mine or chosen == "0" or self._breakpoint is not sys.__breakpointhook__:
            return self._breakpoint(*args, **kwargs)
        if chosen not in {"", "pdb.set_trace"}:
            # When a foreign debugger lets go cannot be known: it gets the terminal for good.
            self._close()
            return self._breakpoint(*args, **kwargs)
        from learnit_r8.dashboard.debugger import ScreenPdb

        frame = sys._getframe().f_back
        ScreenPdb(self._suspend).set_trace(frame)
        return None

    def _report(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        self._close()
        self._except(kind, error, trace)
