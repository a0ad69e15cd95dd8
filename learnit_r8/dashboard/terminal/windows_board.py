"""A Windows console as a board: windows-curses (PDCurses) writes the console itself, and one thread only calls it.

Descriptors cannot be redirected as on POSIX systems: Python's console streams keep the handle that they were made
with, and fail after a `dup2`. So `sys.stdout`, `sys.stderr` and the logging handlers on them are pointed at the console
file, and the process's standard handles for what children print. Ctrl-C stays a signal.
"""

from __future__ import annotations

import contextlib
import ctypes
import curses
import importlib
import io
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from learnit_r8.dashboard.drawing.cells import Grid
from learnit_r8.dashboard.terminal.board import Board
from learnit_r8.dashboard.terminal.capture import ConsoleFile
from learnit_r8.dashboard.terminal.curses_screen import Cells, start_colours

_HANDLES = {"stdout": -11, "stderr": -12}
_NAMES = {
    "KEY_UP": "KEY_UP", "KEY_A2": "KEY_UP", "KEY_DOWN": "KEY_DOWN", "KEY_C2": "KEY_DOWN", "KEY_LEFT": "KEY_LEFT",
    "KEY_B1": "KEY_LEFT", "KEY_RIGHT": "KEY_RIGHT", "KEY_B3": "KEY_RIGHT", "KEY_PPAGE": "KEY_PPAGE",
    "KEY_A3": "KEY_PPAGE", "KEY_NPAGE": "KEY_NPAGE", "KEY_C3": "KEY_NPAGE", "KEY_HOME": "KEY_HOME",
    "KEY_A1": "KEY_HOME", "KEY_END": "KEY_END", "KEY_C1": "KEY_END", "KEY_BACKSPACE": "KEY_BACKSPACE",
    "KEY_BTAB": "BACKTAB", "KEY_ENTER": "ENTER", "PADENTER": "ENTER",
}  # fmt: skip
_CONTROL = {8: "KEY_BACKSPACE", 9: "TAB", 10: "ENTER", 12: "^L", 13: "ENTER", 27: "ESC", 459: "ENTER"}


def is_console(stream: Any) -> bool:
    """Return whether a stream is a Windows console: `isatty` says so of NUL too, and curses would end the process."""
    try:
        handle = importlib.import_module("msvcrt").get_osfhandle(stream.fileno())
        return bool(_kernel().GetConsoleMode(ctypes.c_void_p(handle), ctypes.byref(ctypes.c_uint32())))
    except (ImportError, AttributeError, OSError, ValueError):
        return False


def _kernel() -> Any:
    library: Any = getattr(ctypes, "WinDLL")("kernel32")  # noqa: B009 - there is none elsewhere
    library.GetStdHandle.restype = ctypes.c_void_p
    return library


class StreamCapture(ConsoleFile):
    """Sends `sys.stdout`, `sys.stderr` and what children print into one file, from `engage` to `release`."""

    def __init__(self, path: Path | None = None) -> None:
        super().__init__(path)
        self._into: Any = None
        self._before: dict[str, Any] = {}
        self._handles: dict[str, Any] = {}

    def engage(self) -> None:
        if self._before or self._file < 0:
            return
        if self._into is None:
            raw = io.FileIO(self._file, "w", closefd=False)
            self._into = io.TextIOWrapper(raw, "utf-8", "replace", line_buffering=True, write_through=True)
        handle = importlib.import_module("msvcrt").get_osfhandle(self._file)
        os.set_inheritable(self._file, True)
        for name, number in _HANDLES.items():
            stream = getattr(sys, name)
            if is_console(stream):
                stream.flush()
                self._before[name] = stream
                self._handles[name] = _kernel().GetStdHandle(number)
                _kernel().SetStdHandle(number, ctypes.c_void_p(handle))
                setattr(sys, name, self._into)
        self._move_handlers(dict.fromkeys(self._before.values(), self._into))

    def release(self) -> None:
        """Give the streams back, where nobody has replaced them since."""
        for name, stream in self._before.items():
            if getattr(sys, name) is self._into:
                setattr(sys, name, stream)
            _kernel().SetStdHandle(_HANDLES[name], ctypes.c_void_p(self._handles[name]))
        if self._before:
            standard = self._before.get("stderr") or self._before["stdout"]
            self._move_handlers({self._into: standard})
        self._before.clear()

    def show(self, text: bytes) -> None:
        stream = self._before.get("stdout") or sys.stdout
        if text and stream is not None and stream is not self._into:
            with contextlib.suppress(OSError, ValueError):
                stream.write(text.decode("utf-8", "replace"))
                stream.flush()

    @staticmethod
    def _move_handlers(streams: Mapping[Any, Any]) -> None:
        for reference in list(logging._handlerList):  # type: ignore[attr-defined]
            handler = reference() if callable(reference) else reference
            if isinstance(handler, logging.StreamHandler) and handler.stream in streams:
                handler.setStream(streams[handler.stream])


class WindowsBoard(Board):
    """Owns the console while it is shown.

    Prints are kept (again) by `enter`, after curses has taken the standard handles that it needs.
    """

    key_seconds = 0.05

    def __init__(self, environment: Mapping[str, str], console: Path | None, prints: bool) -> None:
        self._environment = environment
        self._capture = StreamCapture(console) if prints else None
        self.prints = self._capture
        self._window: Any = None
        self._named: dict[int, str] = {}
        self._in = False
        self._mode = ctypes.c_uint32()

    def enter(self) -> None:
        if self._window is None:
            os.environ.setdefault("PDC_RESTORE_SCREEN", "1")  # the user's own lines come back when the view is left
            self._out = ctypes.c_void_p(_kernel().GetStdHandle(_HANDLES["stdout"]))
            _kernel().GetConsoleMode(self._out, ctypes.byref(self._mode))
            self._window = curses.initscr()
            # A console may take no escape sequences, as the tones need.
            self._cells = Cells(self._window, start_colours(self._environment, tones=False))
            self._named = {number: name for key, name in _NAMES.items() if (number := getattr(curses, key, None))}
            self._window.leaveok(True)
            self._window.keypad(True)
            self._window.nodelay(True)
        curses.noecho()
        curses.cbreak()
        with contextlib.suppress(curses.error):
            curses.curs_set(0)
        if self._capture is not None:
            self._capture.engage()
        self._in = True
        self.repaint()

    def size(self) -> tuple[int, int]:
        rows, columns = self._window.getmaxyx()
        return columns, rows

    def pressed(self) -> Sequence[str]:
        found = []
        while (number := self._window.getch()) != -1:
            if number == curses.KEY_RESIZE:
                curses.resize_term(0, 0)
                self.repaint()
                continue
            name = _CONTROL.get(number) or self._named.get(number)
            if name or 32 <= number < 256:
                found.append(name or chr(number))
        return found

    def draw(self, grid: Grid) -> None:
        self._cells.show(grid)

    def repaint(self) -> None:
        self._cells.whole = True

    def leave(self) -> None:
        if self._in:
            self._in = False
            with contextlib.suppress(curses.error):
                self._window.erase()  # not every console brings back what it showed before
                self._window.refresh()
                curses.curs_set(1)
                curses.endwin()
            # PDCurses leaves a console in which a line's end is a glyph.
            _kernel().SetConsoleMode(self._out, self._mode)

    def lend(self, last: bool = False) -> None:
        if self._capture is not None:
            self._capture.release()
            self._capture.show(self._capture.unshown(last))

    def release(self) -> None:
        self.lend(last=True)
        if self._capture is not None:
            self._capture.close()

    abandon = release

    def emergency(self) -> None:
        if self._capture is not None:
            self._capture.release()
