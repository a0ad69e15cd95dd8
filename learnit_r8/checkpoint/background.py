"""A save that goes on while training does: one thread, whose outcome is asked for later."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """A function that a thread of its own has begun. The interpreter does not end before it has returned.

    Args:
        do: The function.
    """

    def __init__(self, do: Callable[[], T]) -> None:
        self._outcome: Future[T] = Future()
        self._pid = os.getpid()
        _under_way.add(self)
        threading.Thread(target=self._run, args=(do,), name="r8-save").start()

    def _run(self, do: Callable[[], T]) -> None:
        try:
            self._outcome.set_result(do())
        except BaseException as error:
            self._outcome.set_exception(error)

    @property
    def ours(self) -> bool:
        """Whether the thread is of this process; in a forked child nobody finishes what the parent has begun."""
        return self._pid == os.getpid()

    @property
    def done(self) -> bool:
        """Whether it has returned, or failed."""
        return self._outcome.done()

    def wait(self) -> None:
        """Return when it has returned, or failed."""
        self._outcome.exception()

    def result(self) -> T:
        """Wait for what it returns, or raise what it raised."""
        return self._outcome.result()


def wait_for_all() -> None:
    """Return when nothing is under way in this process; whoever began it hears of failures."""
    for one in list(_under_way):
        if one.ours:
            one.wait()


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
