"""Deep copies of state trees into buffers that are used again.

A copy is made in three steps, so that whatever can fail fails before a single old byte is lost:
*collect* the arrays of the tree, let `copy.deepcopy` make the new tree around buffers (recycled where
shape, strides and dtype are unchanged, allocated otherwise), and only then *fill* the buffers.

Arrays that share memory (tied weights, views of one flat buffer) share it in the copy as well:
arrays whose address ranges overlap form a group, and a group of different views is copied as one
range of bytes that the views are laid over again.

A tensor made of tensors (`tensor_parts.py`) is copied through its parts. What can be copied in none of these ways ends
in a TypeError before anything has changed: a backup that is not the state would be worse than none.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import mmap
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from learnit_r8.stability.tensor_parts import Parts, all_finite, made_of, parts_of, readable

_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes})
_ALIGNMENT = 64
_CHUNK_BYTES = 1 << 20
_PRIVATE: dict[str, int] = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}

Pool = dict[tuple[Any, ...], list[Any]]


class _Leaf(NamedTuple):
    """One array of the source: where it is in the tree and in memory. Buffers of the same layout fit it."""

    path: str
    node: Any
    array: Any
    is_tensor: bool
    device: str
    strides: tuple[int, ...]
    low: int
    high: int
    layout: tuple[Any, ...]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class TreeCopy:
    """A deep copy, its distinct arrays by path, and its buffers by layout; tensors are detached and on the CPU."""

    tree: Any
    arrays: tuple[tuple[str, Any], ...]
    pool: Pool
    nbytes: int

    @property
    def paths(self) -> frozenset[str]:
        """Paths of all arrays."""
        return frozenset(path for path, _ in self.arrays)

    def nonfinite(self) -> frozenset[str]:
        """Return the paths of the float arrays that hold NaN or infinity."""
        return frozenset(path for path, array in self.arrays if not all_finite(array))


def buffers_of(tree: Any) -> Pool:
    """Return the CPU arrays of a copy that is not needed any more, each as a buffer for another one."""
    pool: Pool = {}
    leaves = _collect(tree, "", set(), {}, [], [])
    for first, *others in _groups([leaf for leaf in leaves if leaf.device == "cpu"]):
        if all(leaf.layout == first.layout and leaf.low == first.low for leaf in others):
            pinned = first.is_tensor and first.array.is_pinned()
            layout = (True, "pinned", *first.layout[2:]) if pinned else first.layout
            pool.setdefault(layout, []).append(first.array)
    return pool


class CopyPlan:
    """A copy that is assembled but not filled: nothing of `recycled`, buffers to use again, has been written to yet."""

    def __init__(self, source: Any, recycled: Pool | None = None) -> None:
        self._available = {layout: list(buffers) for layout, buffers in (recycled or {}).items()}
        self._pool: Pool = {}
        self._jobs: list[tuple[Callable[[Any, Any], None], Any, Any]] = []
        self._placed: dict[int, Any] = {}
        self._arrays: list[tuple[str, Any]] = []
        self._nbytes = 0
        self._arena = _Arena()
        parts: list[tuple[Any, Parts]] = []
        others: list[tuple[str, Any]] = []
        leaves = list(_collect(source, "", set(), self._placed, parts, others))
        for group in _groups(leaves):
            self._place(group)
        copies: dict[int, Any] = {}
        for path, node in others:
            # Framework tensors that are not plain memory, of torch or of anything that looks like it.
            tensor = callable(getattr(node, "detach", None)) and callable(getattr(node, "cpu", None))
            copies[id(node)] = copy.deepcopy(node.detach().cpu() if tensor else node, copies)
            self._arrays.extend(readable(copies[id(node)], path))
        memo = copies | self._placed
        for node, whole in reversed(parts):
            memo[id(node)] = made_of(node, whole, {name: memo[id(part)] for name, part in whole.tensors.items()})
        self._tree = copy.deepcopy(source, memo)
        self._on_gpu = any(leaf.device.startswith("cuda") for leaf in leaves)

    def fill(self) -> TreeCopy:
        """Copy the bytes and return the finished copy."""
        for job, target, source in self._jobs:
            job(target, source)
        if self._on_gpu:  # into pinned memory all copies run together
            sys.modules["torch"].cuda.synchronize()
        return TreeCopy(self._tree, tuple(self._arrays), self._pool, self._nbytes)

    def _place(self, group: list[_Leaf]) -> None:
        first = group[0]
        if all(leaf.low == first.low and leaf.layout == first.layout for leaf in group):
            buffer = self._buffer(first.layout, lambda: _empty_like(first, self._arena))
            self._jobs.append((_copy_tensor if first.is_tensor else np.copyto, buffer, first.array))
            self._nbytes += first.array.nbytes
            views = [buffer] * len(group)
        else:
            views = self._place_range(group)
        for leaf, view in zip(group, views, strict=True):
            if id(leaf.node) not in self._placed:
                self._placed[id(leaf.node)] = view
                self._arrays.append((leaf.path, view))

    def _place_range(self, group: list[_Leaf]) -> list[Any]:
        low, high = min(leaf.low for leaf in group), max(leaf.high for leaf in group)
        size = high - low
        # The copy keeps the address modulo the alignment, so that every view stays aligned.
        pad = low % _ALIGNMENT
        layout = ("bytes", size)
        raw = self._buffer(layout, lambda: self._arena.take(size + 2 * _ALIGNMENT))
        memory = raw[-raw.ctypes.data % _ALIGNMENT :]
        self._jobs.append((_copy_range, memory[pad : pad + size], (group[0], low, high)))
        self._nbytes += size
        return [_view(leaf, memory, pad + leaf.low - low) for leaf in group]

    def _buffer(self, layout: tuple[Any, ...], allocate: Callable[[], Any]) -> Any:
        free = self._available.get(layout)
        buffer = free.pop() if free else allocate()
        self._pool.setdefault(layout, []).append(buffer)
        return buffer


def _is_atom(node: Any) -> bool:
    """Say whether a node never changes: Python's random generator has its state as a tuple of 625 numbers."""
    return type(node) in _ATOMS or (type(node) is tuple and _ATOMS.issuperset(map(type, node)))


def _children(node: Any) -> list[tuple[Any, Any]] | None:
    """Return (key, child) of a container that is copied piece by piece, None for anything else."""
    if hasattr(type(node), "__deepcopy__"):
        return None
    if isinstance(node, dict):
        return list(node.items())
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return list(zip(node._fields, node, strict=True))  # optax's states: the names tell what follows the gradients
    if isinstance(node, list) or type(node) is tuple:
        return list(enumerate(node))
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        names = [field.name for field in dataclasses.fields(node)]
        return [(name, getattr(node, name)) for name in names if hasattr(node, name)]
    return None


def _collect(
    node: Any,
    path: str,
    seen: set[int],
    kept: dict[int, Any],
    parts: list[tuple[Any, Parts]],
    others: list[tuple[str, Any]],
) -> Iterator[_Leaf]:
    """Yield the arrays of a tree.

    Fill `kept` with what never changes, `parts` with the tensors made of tensors, `others` with what is none of these.
    """
    leaf = _leaf(node, path)
    if leaf is not None:
        yield leaf
        return
    if id(node) in seen:
        return
    children = _children(node)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(node, getattr(torch, "Tensor", ())):
        inner = parts_of(node, path, torch)
        one = len(inner.tensors) == 1
        children = [(None if one else name, tensor) for name, tensor in inner.tensors.items()] or None
        if children:
            parts.append((node, inner))
    seen.add(id(node))
    if children is None:
        others.append((path, node))
    for key, child in children or ():
        if not _is_atom(child):
            yield from _collect(child, path if key is None else f"{path}/{key}", seen, kept, parts, others)
        elif type(child) is tuple:
            kept[id(child)] = child


def _leaf(node: Any, path: str) -> _Leaf | None:
    if isinstance(node, np.ndarray):
        if type(node) not in (np.ndarray, np.memmap) or node.dtype.hasobject:
            return None
        address = node.__array_interface__["data"][0]
        low, high = _extent(address, node.shape, node.strides, node.itemsize)
        layout = False, "cpu", node.dtype, node.shape, node.strides
        return _Leaf(path, node, node.view(np.ndarray), False, "cpu", node.strides, low, high, layout)
    torch = sys.modules.get("torch")
    if torch is None or not _is_plain_tensor(node, torch):
        return None
    tensor = node.detach()
    size, shape, device = tensor.element_size(), tuple(tensor.shape), "cpu" if tensor.is_cpu else str(tensor.device)
    strides = tuple(step * size for step in tensor.stride())
    low, high = _extent(tensor.data_ptr(), shape, strides, size)
    layout = True, "cpu" if device == "cpu" else "pinned", tensor.dtype, shape, strides
    return _Leaf(path, node, tensor, True, device, strides, low, high, layout)


def _is_plain_tensor(node: Any, torch: Any) -> bool:
    """Say whether the tensor is dense memory; others (sparse, quantized, wrappers) are deep-copied."""
    return (
        type(node) in (getattr(torch, "Tensor", None), getattr(getattr(torch, "nn", None), "Parameter", None))
        and node.layout is torch.strided
        and not (node.is_quantized or node.is_meta or node.is_conj() or node.is_neg())
    )


def _extent(address: int, shape: Any, strides: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """Return the range of addresses that a strided array touches; empty arrays touch none."""
    if 0 in shape:
        return 0, 0
    low = high = address
    for count, step in zip(shape, strides, strict=True):
        if step > 0:
            high += (count - 1) * step
        else:
            low += (count - 1) * step
    return low, high + itemsize


def _groups(leaves: list[_Leaf]) -> Iterator[list[_Leaf]]:
    """Yield the arrays that share memory together."""
    group: list[_Leaf] = []
    high = 0
    for leaf in sorted(leaves, key=lambda leaf: (leaf.device, leaf.low, leaf.high)):
        if group and leaf.device == group[0].device and leaf.low < high:
            group.append(leaf)
            high = max(high, leaf.high)
            continue
        if group:
            yield group
        group, high = [leaf], leaf.high
    if group:
        yield group


class _Arena:
    """Memory that is mapped apart from the heap, for buffers that outlive the step in which they are made.

    Amid the heap they would lie where a training step's own arrays were and come again: the heap then
    grows and shrinks at every step, at hundreds of page faults each (5% of a step of 13 ms).
    """

    def __init__(self) -> None:
        self._left = np.empty(0, np.uint8)

    def take(self, nbytes: int) -> NDArray[np.uint8]:
        """Return aligned memory that nothing else uses; it is freed with the last array in its chunk."""
        size = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        if size > len(self._left):
            chunk = mmap.mmap(-1, max(size, _CHUNK_BYTES), **_PRIVATE)
            if len(chunk) > _CHUNK_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
                with contextlib.suppress(OSError):  # a kernel without them
                    chunk.madvise(mmap.MADV_HUGEPAGE)
            self._left = np.frombuffer(chunk, np.uint8)
        part, self._left = self._left[:nbytes], self._left[size:]
        return part


def _empty_like(leaf: _Leaf, arena: _Arena) -> Any:
    array, size = leaf.array, leaf.high - leaf.low
    dense = 0 < size == array.nbytes
    if not leaf.is_tensor:
        if not dense or min(leaf.strides, default=0) < 0:
            return np.empty_like(array)
        return np.ndarray(array.shape, array.dtype, buffer=arena.take(size).data, strides=leaf.strides)
    torch = sys.modules["torch"]
    if not dense or array.is_cuda:
        # Pinned memory lets an accelerator write at the bus's full speed.
        return torch.empty_like(array, device="cpu", pin_memory=array.is_cuda)
    storage = torch.from_numpy(arena.take(size)).untyped_storage()
    return torch.empty(0, dtype=array.dtype).set_(storage, 0, array.shape, array.stride())


def _copy_tensor(target: Any, source: Any) -> None:
    target.copy_(source, non_blocking=source.is_cuda)


def _copy_range(target: NDArray[np.uint8], source: tuple[_Leaf, int, int]) -> None:
    leaf, low, high = source
    if leaf.device == "cpu":
        memory = (ctypes.c_uint8 * (high - low)).from_address(low)
        np.copyto(target, np.ctypeslib.as_array(memory))
        return
    torch = sys.modules["torch"]
    storage = leaf.array.untyped_storage()
    memory = torch.empty(0, dtype=torch.uint8, device=leaf.array.device).set_(storage)
    offset = low - storage.data_ptr()
    torch.from_numpy(target).copy_(memory[offset : offset + high - low])


def _view(leaf: _Leaf, memory: NDArray[np.uint8], offset: int) -> Any:
    """Lay the leaf's shape over `memory`, its lowest address at `offset`."""
    lead = -sum(min(0, (count - 1) * step) for count, step in zip(leaf.array.shape, leaf.strides, strict=True))
    if not leaf.is_tensor:
        return np.ndarray(
            leaf.array.shape, leaf.array.dtype, buffer=memory.data, offset=offset + lead, strides=leaf.strides
        )
    torch = sys.modules["torch"]
    view = torch.empty(0, dtype=leaf.array.dtype)
    storage = torch.from_numpy(memory).untyped_storage()
    return view.set_(storage, (offset + lead) // view.element_size(), leaf.array.shape, leaf.array.stride())
