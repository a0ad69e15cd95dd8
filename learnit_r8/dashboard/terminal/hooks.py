"""Moments at which the user must see the terminal: prompts, debuggers, shells within the program, and a traceback."""

from __future__ import annotations

import builtins
import code
import contextlib
import getpass
import importlib.util
import os
import pdb
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import wraps
from types import ModuleType
from typing import Any

from learnit_r8.dashboard.terminal.board import POSIX

Suspend = Callable[[], AbstractContextManager[None]]
"""Makes a context manager that gives the terminal to the user."""
_DEBUGGERS = {"", "0", "pdb.set_trace", "ipdb.set_trace", "IPython.core.debugger.set_trace"}
"""Values of PYTHONBREAKPOINT whose debugger is `pdb.Pdb` or a child of it."""
_HANG_SECONDS = 2.0
_LATE = {
    "IPython.terminal.interactiveshell": ("TerminalInteractiveShell", "interact"),
    "prompt_toolkit.application.application": ("Application", "run"),
}
"""What talks to the user in modules that are slow to load: wrapped when they are."""


class TalkHooks:
    """Wraps what talks to the user until `remove`.

    `input()`, `getpass`, reads from `sys.stdin`, `code.interact`, IPython and prompt_toolkit have the terminal while
    they run; a debugger has it from its stop to `continue` or `quit`; a traceback, `os._exit` and `os.exec*` get it for
    good.

    Args:
        suspend: Context manager that gives the terminal to the user.
        close: Called before a traceback is printed, so that it lands on the normal screen.
    """

    def __init__(self, suspend: Suspend, close: Callable[[], None]) -> None:
        self._suspend, self._close = suspend, close
        self._pid = os.getpid()
        self._wrapped: list[tuple[Any, str, Any, Any]] = []
        self._debugging = contextlib.ExitStack()
        self._talking = False
        self._wrap(builtins, "input", self._suspend)
        self._wrap(code.InteractiveConsole, "interact", self._suspend)
        self._wrap(getpass, *(("_raw_input", self._unseen) if POSIX else ("getpass", self._suspend)))
        self._wrap(pdb.Pdb, "interaction", self._debugger_begins)
        self._wrap(pdb.Pdb, "set_continue", self._debugger_ends)
        self._wrap(pdb.Pdb, "set_quit", self._debugger_ends)
        for name in ("_exit", "execv", "execve"):  # the shell would take the view's modes for the user's
            self._wrap(os, name, self._at_once)
        self._wrap(sys, "excepthook", self._for_good)
        if os.environ.get("PYTHONBREAKPOINT", "") not in _DEBUGGERS:
            # When a foreign debugger lets go cannot be known.
            self._wrap(sys, "breakpointhook", self._for_good)
        with contextlib.suppress(AttributeError, ValueError):
            if sys.stdin.isatty():
                self._put(sys, "stdin", sys.stdin, _Reader(sys.stdin, suspend))
        for name in sys.modules.keys() & _LATE.keys():
            self._wrap_late(sys.modules[name])
        sys.meta_path.insert(0, self)

    def remove(self) -> None:
        """Put back what was there, where nobody has replaced it since."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        for owner, name, before, mine in reversed(self._wrapped):
            if vars(owner).get(name) is mine:
                setattr(owner, name, before)
        self._wrapped.clear()
        self._debugging.close()

    def _wrap(self, owner: Any, name: str, around: Suspend) -> None:
        before = getattr(owner, name, None)
        if before is not None:
            self._put(owner, name, before, _within(around, before))

    def _put(self, owner: Any, name: str, before: Any, mine: Any) -> None:
        setattr(owner, name, mine)
        self._wrapped.append((owner, name, before, mine))

    @contextlib.contextmanager
    def _unseen(self) -> Iterator[None]:
        """For `getpass`, which has turned off the echo of modes that `suspend` replaces by the user's."""
        with self._suspend(), _no_echo():
            yield

    @contextlib.contextmanager
    def _debugger_begins(self) -> Iterator[None]:
        if not self._talking:
            self._talking = True
            self._debugging.enter_context(self._suspend())
        yield

    @contextlib.contextmanager
    def _debugger_ends(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._talking = False
            self._debugging.close()

    @contextlib.contextmanager
    def _for_good(self) -> Iterator[None]:
        self._close()
        yield

    @contextlib.contextmanager
    def _at_once(self) -> Iterator[None]:
        """For what ends the program without a word, may be called because something hangs, and is every child's end."""
        if os.getpid() == self._pid:
            closing = threading.Thread(target=self._close, daemon=True)
            with contextlib.suppress(RuntimeError):  # the interpreter is going
                closing.start()
                closing.join(_HANG_SECONDS)
        yield

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        """Wrap a module of `_LATE` once it is loaded; part of the protocol of `sys.meta_path`."""
        if name not in _LATE or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            execute = loader.exec_module

            def execute_and_wrap(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    self._wrap_late(module)

            loader.exec_module = execute_and_wrap
        return spec

    def _wrap_late(self, module: ModuleType) -> None:
        kind, name = _LATE[module.__name__]
        self._wrap(getattr(module, kind), name, self._suspend)


class _Reader:
    """`sys.stdin`, with the terminal given to the user while it is read."""

    def __init__(self, stream: Any, suspend: Suspend) -> None:
        self._stream = stream
        for name in ("read", "readline", "readlines"):
            setattr(self, name, _within(suspend, getattr(stream, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.readline, "")

    def __next__(self) -> str:
        return next(iter(self))


def _within(around: Suspend, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def mine(*args: Any, **kwargs: Any) -> Any:
        with around():
            return function(*args, **kwargs)

    return mine


@contextlib.contextmanager
def _no_echo() -> Iterator[None]:
    import termios

    with open(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY), "rb", buffering=0) as tty:
        before = termios.tcgetattr(tty)
        termios.tcsetattr(tty, termios.TCSAFLUSH, [*before[:3], before[3] & ~termios.ECHO, *before[4:]])
        try:
            yield
        finally:
            termios.tcsetattr(tty, termios.TCSADRAIN, before)
