"""What both buffers have in common: states that are checked before anything changes, files, copies."""

from __future__ import annotations

import copy
import os
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from learnit_r8.core.portable import portable
from learnit_r8.core.state import Kind, Saved
from learnit_r8.errors import CheckpointError, ProtocolError, StateError, tell
from learnit_r8.replay.disk import read, write


class SavedBuffer(Saved):
    """Base of the buffers; their tables are of all but the experiences, which may be left out."""

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Make one that hears of forks."""
        made = super().__new__(cls)
        _buffers.add(made)
        return made

    def _forked(self) -> None:
        """Begin a copy's life in a forked child, where no thread is but the one that forked."""
        self._lock = _ForkedLock(self._lock)

    def _settle(self) -> None:
        """Wait for whoever needs the lock to finish what was begun."""

    def _made_with(self) -> dict[str, Any]:
        """Return the arguments that a state's buffer must have in common with this one, as JSON data."""
        raise NotImplementedError

    def _held(self, experiences: bool, *, copy: bool) -> Any:
        """Return the experiences; with `copy=False` as views, for a caller who holds the lock until it is done."""
        raise NotImplementedError

    def _hold(self, state: Mapping[str, Any], before: Mapping[str, Any]) -> None:
        """Let this shallow copy, which had the attributes `before`, hold a state's experiences; called last."""
        raise NotImplementedError

    def _state(self, experiences: bool, *, copy: bool) -> dict[str, Any]:
        held = self._held(experiences, copy=copy)
        return {"version": 1, "made_with": self._made_with(), **self._state_tree(), "experiences": held}

    def state_dict(self, *, experiences: bool = True) -> dict[str, Any]:
        """Return copies of all that later draws depend on; the experiences themselves are listed as they are.

        Args:
            experiences: False leaves them out. Those in files (`path`) are flushed and opened
                again on loading; they go on changing, so such a state is good for stopping
                and going on, not for going back.
        """
        self._settle()
        with self._lock:
            return portable(self._state(experiences, copy=True))  # type: ignore[no-any-return]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            CheckpointError: The state is damaged, or of a buffer made with other arguments. Nothing is changed.
        """
        if not isinstance(state, Mapping):
            raise CheckpointError(f"a state is the dict that state_dict() returned, got {type(state).__name__}")
        mine = {"version", "made_with", "experiences", *self._table}
        missing, unknown = sorted(mine - {*state}), [key for key in state if key not in mine]
        if missing or unknown or state["version"] != 1:
            raise CheckpointError(
                f"this is no state of a buffer of version 1: got version {state.get('version')!r}, missing {missing}, "
                f"unknown {unknown}"
            )
        self._settle()
        with self._lock:
            super().load_state_dict(state)

    def _take_state(self, state: Mapping[str, Any], changes: list[Any]) -> None:
        before = copy.copy(vars(self))
        check_made_with(state["made_with"], self._made_with())
        super()._take_state(state, changes)
        try:
            self._hold(state, before)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise StateError(f"the state is damaged ({type(error).__name__}: {error})") from error

    def save(self, path: str | Path, *, experiences: bool = True) -> None:
        """Write the buffer into one file, whole or not at all; other threads wait until that is done.

        Args:
            path: Name of the file. One of that name is replaced once the new one is complete.
            experiences: False leaves them in the files of a memory-mapped buffer: see `state_dict`.

        Raises:
            CheckpointError: Something in it is of a kind that no file holds.
            OSError: A write failed. An older file is as it was in either case.
        """
        self._settle()
        with self._lock:
            state = self._state(experiences, copy=False)
            if state["experiences"] is None:
                raise CheckpointError("experiences=False needs a buffer with path=, whose files hold them")
            write(path, {"class": type(self).__name__, **state})

    def load(self, path: str | Path) -> None:
        """Restore what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            CheckpointError: It is damaged, or of a buffer made with other arguments. Nothing is changed.
        """
        state = read(path)
        check_made_with({"class": state.pop("class", None)}, {"class": type(self).__name__})
        self.load_state_dict(state)


class _ForkedLock:
    """A buffer's lock in a forked child: tells once whose copy it guards, and refuses one that was being changed."""

    def __init__(self, parents: Any) -> None:
        self._torn, self._told, self._lock = not parents.acquire(blocking=False), False, threading.RLock()

    def __enter__(self) -> None:
        if self._torn:
            raise ProtocolError(
                "this process was forked while another thread was changing the replay buffer, so its copy is torn: "
                "fork before threads use the buffer, or start the process with spawn and give it the buffer"
            )
        if not self._told:
            self._told = True
            tell(
                "a forked process (a DataLoader's worker?) has a copy of the replay buffer that goes its own way: it "
                "draws what the original and other copies draw, and hears nothing of what is added or reported there. "
                "Use the buffer in the process that trains, or give each process a buffer with a seed of its own",
                stacklevel=3,
            )
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def acquire(self, *, blocking: bool) -> bool:
        """Take the lock, for a child of the child."""
        return not self._torn and self._lock.acquire(blocking=blocking)


_buffers: weakref.WeakSet[SavedBuffer] = weakref.WeakSet()


def _after_fork() -> None:
    for buffer in list(_buffers):
        buffer._forked()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)


def check_made_with(came: Any, mine: Mapping[str, Any]) -> None:
    """Raise CheckpointError, with the arguments that differ, unless the state's buffer was made as this one."""
    came = came if isinstance(came, Mapping) else {}
    theirs = {name: came.get(name) for name in mine if name not in came or came[name] != mine[name]}
    if theirs:
        ours = {name: mine[name] for name in theirs}
        raise CheckpointError(f"the state is of a buffer with {theirs}, this one has {ours}: make it with the same")


def slots(dtype: Any) -> Kind:
    """An array of `capacity` entries, of which the first `len(owner)` are saved."""
    return Kind(
        lambda owner, column: column[: len(owner)].copy(),
        lambda owner, saved: filled(saved, len(owner), np.zeros(owner.capacity, dtype)),
    )


def filled(values: Any, count: int, into: NDArray[Any]) -> NDArray[Any]:
    """Return `into` with its first `count` entries set; raise ValueError where there are more or fewer values."""
    values = np.asarray(values)
    if values.shape != (count, *into.shape[1:]):
        raise ValueError(f"{values.shape} values for {count} experiences")
    into[:count] = values
    return into
