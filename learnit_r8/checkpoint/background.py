"""A save that goes on while training does: one thread, whose outcome is asked for later."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class Background(Future[T]):
    """A function that a thread of its own has begun; the interpreter does not end before it has returned."""

    def __init__(self, do: Callable[[], T]) -> None:
        super().__init__()
        self._pid = os.getpid()
        _under_way.add(self)
        threading.Thread(target=self._run, args=(do,), name="r8-save").start()

    def _run(self, do: Callable[[], T]) -> None:
        try:
            self.set_result(do())
        except BaseException as error:
            self.set_exception(error)

    @property
    def ours(self) -> bool:
        """Whether the thread is of this process; in a forked child nobody finishes what the parent has begun."""
        return self._pid == os.getpid()


def wait_for_all() -> None:
    """Return when nothing is under way in this process; whoever began it hears of failures."""
    for one in list(_under_way):
        if one.ours:
            one.exception()


_under_way: weakref.WeakSet[Background[Any]] = weakref.WeakSet()


class _Alone:
    """Excludes other threads of this process, as locks on files do not; a forked child begins with a free one."""

    def __init__(self) -> None:
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()


ALONE = _Alone()
"""Held while a directory's checkpoints are counted, renamed and removed."""
