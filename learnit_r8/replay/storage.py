"""Where a replay buffer keeps its experiences: any objects, or arrays of fixed shapes.

Both kinds are asked the same: `stack` checks experiences and brings them into the form that is stored, without
changing anything; `write` and `read` work on slots; `copied` returns another one with the same experiences.
`state_dict`/`load_state_dict` copy the first `count` slots; with `copy=False` they are views, for a caller who is done
with them before the next write. `head` is the slot that is written next. Without `contents` there are none, but for
the layout of memory-mapped files, which are flushed.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from learnit_r8.core.urls import local
from learnit_r8.errors import CheckpointError, ConfigError, ProtocolError
from learnit_r8.replay import trees
from learnit_r8.replay.trees import layout_of
from learnit_r8.types import Indices


class ObjectStorage:
    """A list of whatever was added, returned as it was added."""

    def __init__(self, capacity: int) -> None:
        self._slots: list[Any] = [None] * capacity

    def stack(self, experiences: Any, *, stacked: bool) -> tuple[int, Any]:
        """Return the experiences as a list."""
        if stacked:
            raise TypeError('stacked=True needs a buffer made with storage="arrays"')
        experiences = list(experiences)
        return len(experiences), experiences

    def own(self, experience: Any) -> Any:
        """Return one experience as it may be kept for later: objects as they are."""
        return experience

    def write(self, slots: Indices, experiences: Any) -> None:
        """Put the experiences into the slots."""
        for slot, experience in zip(slots.tolist(), experiences[-len(slots) :], strict=True):
            self._slots[slot] = experience

    def read(self, slots: Indices) -> list[Any]:
        """Return the very objects that were added."""
        return [self._slots[slot] for slot in slots.tolist()]

    def copied(self) -> ObjectStorage:
        """Return the same experiences in a list of its own."""
        other = ObjectStorage(0)
        other._slots = self._slots.copy()
        return other

    def state_dict(self, count: int, head: int, *, contents: bool, copy: bool = True) -> dict[str, Any] | None:
        """Return the first `count` experiences in a new list, or None."""
        return {"kind": "objects", "experiences": self._slots[:count]} if contents else None

    def load_state_dict(self, state: dict[str, Any], count: int, head: int) -> None:
        """Restore the experiences."""
        experiences = list(state["experiences"])
        if len(experiences) != count:
            raise CheckpointError(f"the state has {len(experiences)} experiences where it says {count}")
        self._slots = experiences + [None] * (len(self._slots) - count)


class ArrayStorage:
    """One preallocated array per leaf of the first experience.

    Experiences are arrays, tensors or numbers, or dicts (with string keys) and tuples of
    them, nested as you like; every experience has the shapes and kinds of the first. A named
    tuple comes back as a tuple. Tensors stay tensors, on the device of the first.
    """

    def __init__(self, capacity: int, path: str | Path | None = None) -> None:
        self._capacity = capacity
        self._path = None if path is None else local(path, "path")
        self._process = os.getpid()
        self._spec: trees.Spec | None = None
        self._leaves: list[Any] = []

    def stack(self, experiences: Any, *, stacked: bool) -> tuple[int, Any]:
        """Check experiences against the first one ever added and stack them, leaf by leaf."""
        if stacked:
            leaves: list[Any] = []
            spec = trees.flatten(experiences, leaves)
            counts = {len(leaf) if leaf.ndim else -1 for leaf in leaves}
            if len(counts) != 1 or -1 in counts:
                shapes = [tuple(leaf.shape) for leaf in leaves]
                raise ValueError(f"stacked experiences need one common first dimension, got shapes {shapes}")
        else:
            if not (experiences := list(experiences)):
                return 0, []
            spec, leaves = trees.stack_trees(experiences)
            counts = {len(experiences)}
        self._check(spec, leaves)
        return counts.pop(), (spec, leaves)

    def own(self, experience: Any) -> Any:
        """Return one experience as it may be kept for later: a copy, since environments write into their arrays."""
        leaves: list[Any] = []
        spec = trees.flatten(experience, leaves)
        return trees.unflatten(spec, [leaf.clone() if trees.is_tensor(leaf) else leaf.copy() for leaf in leaves])

    def write(self, slots: Indices, experiences: Any) -> None:
        """Put the experiences into the slots; the first ones decide shapes and kinds."""
        if not slots.size:
            return
        self._check_process()
        spec, leaves = experiences
        if self._spec is None:
            self._leaves = self._allocate_all(leaves)
            self._spec = spec
        for held, leaf in zip(self._leaves, leaves, strict=True):
            held[slots] = leaf[-len(slots) :]

    def read(self, slots: Indices) -> Any:
        """Return one tree whose leaves hold copies of the experiences along their first axis."""
        if self._spec is None:
            raise ValueError("no experience was added yet")
        leaves = [held.take(slots, axis=0) if isinstance(held, np.ndarray) else held[slots] for held in self._leaves]
        return trees.unflatten(self._spec, leaves)

    def copied(self) -> ArrayStorage:
        """Return the same experiences in arrays of its own."""
        if self._path is not None:
            raise TypeError(f"a buffer with its experiences in files ({self._path}) cannot be copied: save() it")
        other = ArrayStorage(self._capacity)
        other._spec = self._spec
        other._leaves = [held.copy() if isinstance(held, np.ndarray) else held.clone() for held in self._leaves]
        return other

    def state_dict(self, count: int, head: int, *, contents: bool, copy: bool = True) -> dict[str, Any] | None:
        """Return the arrays; tensors become arrays, bfloat16 as float32."""
        if not contents and self._path is None:
            return None
        for held in self._leaves:
            if isinstance(held, np.memmap):
                held.flush()
        return {
            "kind": "arrays",
            "spec": self._spec,
            "leaves": [trees.to_numpy(held[:count], copy=copy) for held in self._leaves] if contents else None,
            "tensors": [None if isinstance(held, np.ndarray) else str(held.dtype) for held in self._leaves],
            "layout": [layout_of(held) for held in self._leaves],
            "next_row": None if contents else self._digest(head),
        }

    def load_state_dict(self, state: dict[str, Any], count: int, head: int) -> None:
        """Restore the arrays; tensors come back on the CPU unless the buffer already holds some."""
        self._check_process()
        if state["spec"] is None and not count:
            self._spec, self._leaves = None, []
            return
        trees.check_spec(state["spec"], len(state["layout"]))
        if state["leaves"] is None:
            self._leaves = [self._reopen(number, layout) for number, layout in enumerate(state["layout"])]
            if self._digest(head) != state["next_row"]:
                warnings.warn(
                    f"experiences in {self._path} were overwritten after this state was saved: they are drawn with "
                    "the priorities of the ones before them (save() with experiences=True goes back exactly)",
                    RuntimeWarning,
                    stacklevel=2,
                )
        else:
            self._replace([self._filled(number, state, count) for number in range(len(state["leaves"]))])
        self._spec = state["spec"]

    def _filled(self, number: int, state: dict[str, Any], count: int) -> Any:
        """Return a leaf of `capacity` rows; beside a memory-mapped store a file that is not in use yet."""
        saved, dtype = state["leaves"][number], state["tensors"][number]
        rows: Any = np.asarray(saved) if dtype is None else trees.to_torch(saved, dtype)
        if len(rows) != count or layout_of(rows) != list(state["layout"][number]):
            raise CheckpointError(f"leaf {number} of the state has {len(rows)} rows of {layout_of(rows)}, want {count}")
        if dtype is not None and self._spec == state["spec"]:
            rows = rows.to(self._leaves[number].device)
        held = self._allocate(number, rows, suffix=".new")
        held[:count] = rows
        return held

    def _replace(self, leaves: list[Any]) -> None:
        if self._path is None or not leaves:
            self._leaves = leaves
            return
        for held in leaves:
            held.flush()
        layouts = [layout_of(held) for held in leaves]
        self._leaves = leaves = []  # no file is renamed while it is mapped: Windows forbids that
        for number in range(len(layouts)):
            self._file(number, ".new").replace(self._file(number))
        self._leaves = [self._reopen(number, layout) for number, layout in enumerate(layouts)]

    def _reopen(self, number: int, layout: Sequence[Any]) -> Any:
        file = self._file(number)
        try:
            held = np.lib.format.open_memmap(file, mode="r+")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot open the experiences in {file}: {error}") from error
        if len(held) != self._capacity or layout_of(held) != list(layout):
            raise CheckpointError(
                f"{file} holds {len(held)} experiences of {layout_of(held)}, this state {self._capacity} of {layout}"
            )
        return held

    def _file(self, number: int, suffix: str = "") -> Path:
        if self._path is None:
            raise CheckpointError("the experiences were left in files: make the buffer with the path of their folder")
        return self._path / f"{number:03d}.npy{suffix}"

    def _check_process(self) -> None:
        if self._path is not None and self._process != os.getpid():
            raise ProtocolError(
                f"this process was forked from the one that keeps its experiences in {self._path}: both would write "
                "into the same files. Add and load in the process that made the buffer"
            )

    def _digest(self, row: int) -> str:
        """Return a hash of one row: that of the oldest tells whether anything has been added since."""
        digest = hashlib.sha256()
        for held in self._leaves:
            digest.update(np.ascontiguousarray(held[row]).tobytes())
        return digest.hexdigest()

    def _allocate_all(self, leaves: list[Any]) -> list[Any]:
        made: list[Any] = []
        try:
            made.extend(self._allocate(number, leaf) for number, leaf in enumerate(leaves))
        except Exception:
            for number in range(len(made)):
                if self._path is not None:
                    self._file(number).unlink()
            raise
        return made

    def _allocate(self, number: int, leaf: Any, suffix: str = "") -> Any:
        shape = (self._capacity, *leaf.shape[1:])
        if not isinstance(leaf, np.ndarray):
            if self._path is not None:
                raise ConfigError(["path= keeps numpy arrays only, got a tensor: add arrays, or leave path out"])
            return leaf.new_zeros(shape)
        if self._path is None:
            return np.zeros(shape, leaf.dtype)
        self._path.mkdir(parents=True, exist_ok=True)
        file = self._file(number, suffix)
        if not suffix and file.exists():
            advice = (
                "Load the state that was saved with them before you add any, name another folder, or remove the files"
            )
            raise ConfigError([f"{file} exists: it may hold another buffer's experiences. {advice}"])
        return np.lib.format.open_memmap(file, mode="w+", dtype=leaf.dtype, shape=shape)

    def _check(self, spec: trees.Spec, leaves: list[Any]) -> None:
        for leaf in leaves:
            if isinstance(leaf, np.ndarray) and leaf.dtype.hasobject:
                raise ValueError('arrays of Python objects have no fixed size: use storage="objects"')
        if self._spec is None:
            return
        if spec != self._spec:
            raise ValueError(f"experiences must be built like the first one, {self._spec}, got {spec}")
        for number, (held, leaf) in enumerate(zip(self._leaves, leaves, strict=True)):
            same_kind = (
                isinstance(leaf, np.ndarray) and _may_cast(leaf.dtype, held.dtype)
                if isinstance(held, np.ndarray)
                else getattr(leaf, "dtype", None) == held.dtype
            )
            if tuple(leaf.shape[1:]) != tuple(held.shape[1:]) or not same_kind:
                raise ValueError(
                    f"leaf {number} must be like the first experience's, {tuple(held.shape[1:])} {held.dtype}, got "
                    f'{tuple(leaf.shape[1:])} {leaf.dtype}; for varying shapes use storage="objects"'
                )
            if leaf.dtype != held.dtype and not trees.fits(leaf, held.dtype):
                raise ValueError(
                    f"leaf {number} does not fit into {held.dtype}, which the first experience had: give the first "
                    f'one the type that all of them need, or use storage="objects"; got {leaf!r:.80}'
                )


def _may_cast(given: np.dtype[Any], held: np.dtype[Any]) -> bool:
    return given == held or (
        (given.kind == held.kind or {given.kind, held.kind} <= set("biufc")) and np.can_cast(given, held, "same_kind")
    )
