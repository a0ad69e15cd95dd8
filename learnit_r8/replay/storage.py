"""Where a replay buffer keeps its experiences: any objects, or arrays of fixed shapes.

Both kinds are asked the same four things: `stack` checks experiences and brings them into
the form that is stored, without changing anything; `write` and `read` work on slots;
`state_dict`/`load_state_dict` copy the first `count` slots.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from learnit_r8.errors import CheckpointError, ConfigError
from learnit_r8.types import Indices

Spec = int | dict[str, Any]
"""Shape of an experience as JSON: a leaf's number, or {"dict": {name: spec}} or {"tuple": [spec]}."""


class Storage(Protocol):
    """Numbered slots for experiences."""

    def stack(self, experiences: Any, *, stacked: bool) -> tuple[int, Any]:
        """Return how many experiences these are, and the form that `write` takes."""
        ...

    def write(self, slots: Indices, experiences: Any) -> None:
        """Overwrite slots with what `stack` returned; of more experiences than slots, the last count."""
        ...

    def read(self, slots: Indices) -> Any:
        """Return the experiences of these slots."""
        ...

    def state_dict(self, count: int, *, contents: bool) -> dict[str, Any] | None:
        """Return a copy of the first `count` slots; without `contents`, what is needed to find them again."""
        ...

    def load_state_dict(self, state: dict[str, Any] | None, count: int) -> None:
        """Restore the first `count` slots."""
        ...


class ObjectStorage:
    """A list of whatever was added, returned as it was added.

    Args:
        capacity: Number of slots.
    """

    def __init__(self, capacity: int) -> None:
        self._slots: list[Any] = [None] * capacity

    def stack(self, experiences: Any, *, stacked: bool) -> tuple[int, Any]:
        """Return the experiences as a list.

        Raises:
            TypeError: `stacked` arrays need `storage="arrays"`.
        """
        if stacked:
            raise TypeError('stacked=True needs a buffer made with storage="arrays"')
        experiences = list(experiences)
        return len(experiences), experiences

    def write(self, slots: Indices, experiences: Any) -> None:
        """Put the experiences into the slots."""
        for slot, experience in zip(slots.tolist(), experiences[-len(slots) :], strict=True):
            self._slots[slot] = experience

    def read(self, slots: Indices) -> list[Any]:
        """Return the experiences, the very objects that were added."""
        held = self._slots
        return [held[slot] for slot in slots.tolist()]

    def state_dict(self, count: int, *, contents: bool) -> dict[str, Any] | None:
        """Return the experiences in a new list. The experiences themselves are not copied."""
        return {"kind": "objects", "experiences": self._slots[:count]} if contents else None

    def load_state_dict(self, state: dict[str, Any] | None, count: int) -> None:
        """Restore the experiences."""
        if state is not None:
            _check_kind(state, "objects")
            self._slots[:count] = state["experiences"]


class ArrayStorage:
    """One preallocated array per leaf of the first experience.

    Experiences are arrays, tensors or numbers, or dicts (with string keys) and tuples of
    them, nested as you like; every experience has the shapes and kinds of the first. A named
    tuple comes back as a tuple. Tensors stay tensors, on the device of the first.

    Args:
        capacity: Number of slots.
        path: Folder for memory-mapped files, one `.npy` per leaf, for buffers larger than
            the memory. None: ordinary arrays.
    """

    def __init__(self, capacity: int, path: str | Path | None = None) -> None:
        self._capacity = capacity
        self._path = None if path is None else Path(path)
        self._spec: Spec | None = None
        self._leaves: list[Any] = []

    def stack(self, experiences: Any, *, stacked: bool) -> tuple[int, Any]:
        """Check experiences against the first one ever added and stack them, leaf by leaf.

        Args:
            experiences: A sequence of experiences, or with `stacked` one tree whose leaves
                have the experiences along their first axis.
            stacked: See above.

        Raises:
            ValueError: Structure, shape or kind of number differs from the first one's.
        """
        if stacked:
            leaves: list[Any] = []
            spec = _flatten(experiences, leaves)
            counts = {len(leaf) if leaf.ndim else -1 for leaf in leaves}
            if len(counts) != 1 or -1 in counts:
                shapes = [tuple(leaf.shape) for leaf in leaves]
                raise ValueError(f"stacked experiences need one common first dimension, got shapes {shapes}")
        else:
            if not (experiences := list(experiences)):
                return 0, []
            spec, leaves = _stack(experiences)
            counts = {len(experiences)}
        self._check(spec, leaves)
        return counts.pop(), (spec, leaves)

    def write(self, slots: Indices, experiences: Any) -> None:
        """Put the experiences into the slots; the first ones decide shapes and kinds."""
        if not slots.size:
            return
        spec, leaves = experiences
        if self._spec is None:
            self._leaves = [self._allocate(number, leaf) for number, leaf in enumerate(leaves)]
            self._spec = spec
        for held, leaf in zip(self._leaves, leaves, strict=True):
            held[slots] = leaf[-len(slots) :]

    def read(self, slots: Indices) -> Any:
        """Return one tree whose leaves hold copies of the experiences along their first axis."""
        if self._spec is None:
            raise ValueError("no experience was added yet")
        leaves = [held.take(slots, axis=0) if isinstance(held, np.ndarray) else held[slots] for held in self._leaves]
        return _unflatten(self._spec, leaves)

    def state_dict(self, count: int, *, contents: bool) -> dict[str, Any] | None:
        """Return copies of the arrays; tensors become arrays, bfloat16 as float32.

        Without `contents`: the layout of memory-mapped files, which are flushed.
        """
        if not contents and self._path is None:
            return None
        for held in self._leaves:
            if isinstance(held, np.memmap):
                held.flush()
        return {
            "kind": "arrays",
            "spec": self._spec,
            "leaves": [_to_numpy(held[:count]) for held in self._leaves] if contents else None,
            "tensors": [None if isinstance(held, np.ndarray) else str(held.dtype) for held in self._leaves],
        }

    def load_state_dict(self, state: dict[str, Any] | None, count: int) -> None:
        """Restore the arrays; tensors come back on the CPU unless the buffer already holds some.

        Raises:
            CheckpointError: The state is of another kind of storage, or its files are missing.
        """
        if state is None:
            return
        _check_kind(state, "arrays")
        if state["spec"] is None:
            return
        if state["leaves"] is None:
            self._leaves = [self._reopen(number) for number in range(len(state["tensors"]))]
        else:
            tensors = zip(state["leaves"], state["tensors"], strict=True)
            leaves = [np.asarray(saved) if dtype is None else _to_torch(saved, dtype) for saved, dtype in tensors]
            if self._spec != state["spec"]:
                self._leaves = [self._allocate(number, leaf) for number, leaf in enumerate(leaves)]
            for held, leaf in zip(self._leaves, leaves, strict=True):
                held[:count] = leaf
        self._spec = state["spec"]

    def _reopen(self, number: int) -> Any:
        if self._path is None:
            raise CheckpointError("the experiences were left in files: make the buffer with the path of their folder")
        file = self._path / f"{number:03d}.npy"
        try:
            held = np.lib.format.open_memmap(file, mode="r+")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot open the experiences in {file}: {error}") from error
        if len(held) != self._capacity:
            raise CheckpointError(f"{file} holds {len(held)} experiences, this buffer {self._capacity}")
        return held

    def _allocate(self, number: int, leaf: Any) -> Any:
        shape = (self._capacity, *leaf.shape[1:])
        if not isinstance(leaf, np.ndarray):
            if self._path is not None:
                raise ConfigError(["path= keeps numpy arrays only, got a tensor: add arrays, or leave path out"])
            return leaf.new_zeros(shape)
        if self._path is None:
            return np.zeros(shape, leaf.dtype)
        self._path.mkdir(parents=True, exist_ok=True)
        file = self._path / f"{number:03d}.npy"
        return np.lib.format.open_memmap(file, mode="w+", dtype=leaf.dtype, shape=shape)

    def _check(self, spec: Spec, leaves: list[Any]) -> None:
        for leaf in leaves:
            if isinstance(leaf, np.ndarray) and leaf.dtype.hasobject:
                raise ValueError('arrays of Python objects have no fixed size: use storage="objects"')
        if self._spec is None:
            return
        if spec != self._spec:
            raise ValueError(f"experiences must be built like the first one, {self._spec}, got {spec}")
        for number, (held, leaf) in enumerate(zip(self._leaves, leaves, strict=True)):
            same_kind = (
                isinstance(leaf, np.ndarray) and np.can_cast(leaf.dtype, held.dtype, "same_kind")
                if isinstance(held, np.ndarray)
                else getattr(leaf, "dtype", None) == held.dtype
            )
            if tuple(leaf.shape[1:]) != tuple(held.shape[1:]) or not same_kind:
                raise ValueError(
                    f"leaf {number} must be like the first experience's, {tuple(held.shape[1:])} {held.dtype}, got "
                    f'{tuple(leaf.shape[1:])} {leaf.dtype}; for varying shapes use storage="objects"'
                )


def _check_kind(state: dict[str, Any], kind: str) -> None:
    if state["kind"] != kind:
        raise CheckpointError(f"the state is of storage={state['kind']!r}, this buffer has storage={kind!r}")


def make_storage(kind: str, capacity: int, path: str | Path | None) -> Storage:
    """Return the storage called "objects" or "arrays"."""
    return ObjectStorage(capacity) if kind == "objects" else ArrayStorage(capacity, path)


def as_array(values: Any, cast: Callable[[Any], Any] = lambda tensor: tensor) -> np.ndarray[Any, Any]:
    """Return anything array-like as a numpy array; `cast` is applied to tensors first."""
    if hasattr(values, "detach"):
        values = cast(values.detach()).cpu().numpy()
    return np.asarray(values)


def _is_tensor(leaf: Any) -> bool:
    return hasattr(leaf, "detach") and hasattr(leaf, "new_zeros")


def _flatten(tree: Any, leaves: list[Any]) -> Spec:
    if isinstance(tree, dict):
        if not all(isinstance(key, str) for key in tree):
            raise ValueError(f"dicts of arrays need string keys, got {list(tree)}")
        return {"dict": {key: _flatten(tree[key], leaves) for key in sorted(tree)}}
    if isinstance(tree, tuple):
        return {"tuple": [_flatten(item, leaves) for item in tree]}
    leaves.append(tree.detach() if _is_tensor(tree) else np.asarray(tree))
    return len(leaves) - 1


def _unflatten(spec: Spec, leaves: Sequence[Any]) -> Any:
    if isinstance(spec, int):
        return leaves[spec]
    if "dict" in spec:
        return {key: _unflatten(item, leaves) for key, item in spec["dict"].items()}
    return tuple(_unflatten(item, leaves) for item in spec["tuple"])


def _stack(experiences: list[Any]) -> tuple[Spec, list[Any]]:
    columns: list[list[Any]] = []
    first: Spec | None = None
    for experience in experiences:
        leaves: list[Any] = []
        spec = _flatten(experience, leaves)
        if first is None:
            first = spec
            columns = [[leaf] for leaf in leaves]
            continue
        if spec != first:
            raise ValueError(f"experiences must be built alike: {first} and {spec}")
        for column, leaf in zip(columns, leaves, strict=True):
            if leaf.shape != column[0].shape or leaf.dtype != column[0].dtype:
                raise ValueError(
                    f"experiences must have equal shapes and dtypes: {tuple(column[0].shape)} {column[0].dtype} "
                    f'and {tuple(leaf.shape)} {leaf.dtype}; for varying ones use storage="objects"'
                )
            column.append(leaf)
    assert first is not None
    return first, [_stack_leaf(column) for column in columns]


def _stack_leaf(column: list[Any]) -> Any:
    if not _is_tensor(column[0]):
        return np.stack(column)
    stacked = column[0].new_empty((len(column), *column[0].shape))
    for row, leaf in enumerate(column):
        stacked[row] = leaf
    return stacked


def _to_numpy(held: Any) -> np.ndarray[Any, Any]:
    if isinstance(held, np.ndarray):
        return np.array(held)
    tensor = held.detach().cpu()
    return np.array((tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy())


def _to_torch(saved: Any, dtype: str) -> Any:
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise CheckpointError("this buffer held tensors: restoring it needs torch") from error
    return torch.from_numpy(np.array(saved)).to(getattr(torch, dtype.removeprefix("torch.")))
