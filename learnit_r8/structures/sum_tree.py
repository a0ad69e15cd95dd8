"""Weighted draws over a fixed number of slots: O(log N) to draw, O(log N) to change.

The tree is wide and flat: each node has 16 children, and the last level, at most 4096 sums, is one
array that is searched directly. At a million slots that is two nodes and one search, few enough
numpy calls to compete with compiled trees. Running sums within a node are added up when
they are needed: to read 16 numbers costs less than to keep their sums, too, up to date.

Two rules make the arithmetic exact enough to forget about:

* A changed slot's node is summed anew from its children, first to last, never by adding a difference, so
  rounding errors do not pile up however many updates there have been.
* Within a node, the remainder that is searched for is kept below the node's own total, and
  sums only grow where a weight is positive, so a slot of weight zero is never drawn.

With numba present the same operations run compiled (3 to 12 times as fast), in the same order, so both paths give
the same sums and the same draws to the last bit.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from learnit_r8.errors import ConfigError

Indices = NDArray[np.int64]
Weights = NDArray[np.float64]
Kernels = tuple[Callable[..., float], Callable[..., float]]

_SHIFT = 4
_FAN_OUT = 1 << _SHIFT
"""Of 16, 32, 64 and 128 the fastest for numpy: most of the time goes into copying nodes."""
_LAST_LEVEL = 4096
"""Its running sums cost 4 us an update, another level of nodes more than that."""
MAX_WEIGHT = 1e280
"""Far enough below the largest float64 for every sum to stay finite."""
_FEW = 64
"""Nodes up to which one call of numpy is faster than one for each child."""
_LINE = 8
"""Numbers in a cache line."""
_COMPILE_FROM = 4096
"""Smaller trees are fast enough, and importing numba costs half a second."""


class SumTree:
    """Non-negative weights of `size` slots, and draws in proportion to them; all start at zero.

    Arrays of slots are int64, of weights float64, both in one piece: who calls has checked them. `view` is the
    weights themselves, read-only, and all there is to save; `fill` restores them. What `fast` is
    `PrioritizedReplayBuffer` says.
    """

    def __init__(self, size: int, *, fast: bool | None = None) -> None:
        self.size = size
        widths = _node_counts(size)
        self._starts = np.concatenate([[0], np.cumsum(widths)]).astype(np.int64) * _FAN_OUT
        self._values = _aligned_zeros(int(self._starts[-1]))  # all levels end to end
        self._last_values = np.zeros(widths[-1])
        self._sums_before = np.zeros(widths[-1] + 1)  # the first is 0
        self._last_sums = self._sums_before[1:]
        self._levels = [self._values[start:stop].reshape(-1, _FAN_OUT) for start, stop in pairwise(self._starts)]
        self._parents = [children.reshape(-1) for children in self._levels[1:]] + [self._last_values]
        self.view = self._values[:size]
        self.view.flags.writeable = False
        self._fast = fast
        self._kernels = _choose_kernels(size, fast)

    def __getstate__(self) -> tuple[int, bool | None, Weights]:
        # Copied one by one, arrays that are views of each other would come apart: draws from one, updates to another.
        return self.size, self._fast, self.view.copy()

    def __setstate__(self, state: tuple[int, bool | None, Weights]) -> None:
        size, fast, weights = state
        self.__init__(size, fast=fast)  # type: ignore[misc]
        self.fill(weights)

    @property
    def total(self) -> float:
        """Sum of all weights."""
        return float(self._last_sums[-1])

    def set(self, slots: Indices, weights: Weights) -> None:
        """Give slots new weights, each in `0 .. MAX_WEIGHT`; where a slot is named twice the last one counts."""
        if self._kernels is not None:
            self._kernels[0](self._values, self._starts, self._last_values, self._last_sums, slots, weights)
            return
        self._values[slots] = weights
        nodes = slots
        for children, parents in zip(self._levels, self._parents, strict=True):
            nodes = nodes >> _SHIFT
            if len(nodes) <= _FEW:
                parents[nodes] = np.add.accumulate(children.take(nodes, axis=0), axis=1)[:, -1]
                continue
            total, *others = np.ascontiguousarray(children.take(nodes, axis=0).T)
            for child in others:  # in order; numpy's own sum takes another one where there is one node
                total += child
            parents[nodes] = total
        np.add.accumulate(self._last_values, out=self._last_sums)

    def fill(self, weights: ArrayLike) -> None:
        """Replace all weights; raise ValueError, with nothing changed, where one is negative, NaN or too large."""
        values = np.asarray(weights, np.float64)
        bad = values[~((values >= 0.0) & (values <= MAX_WEIGHT))]
        if bad.size:
            raise ValueError(f"weights must be in 0 .. {MAX_WEIGHT:g}, got {bad[0]} ({bad.size} of {values.size})")
        self._values[: self.size] = values
        for children, parents in zip(self._levels, self._parents, strict=True):
            totals = children[:, 0].copy()
            for child in range(1, _FAN_OUT):
                totals += children[:, child]
            parents[: len(totals)] = totals
        np.add.accumulate(self._last_values, out=self._last_sums)

    def draw(self, u: Weights) -> Indices:
        """Return the slots at which the running sum of all weights passes `u * total`, never one of weight zero.

        Sorted numbers, such as a stratified draw's, are the kindest to the cache.
        """
        if not self._last_sums[-1] > 0.0:
            raise ValueError("nothing to draw: every weight is zero")
        if self._kernels is not None:
            slots = np.empty(len(u), dtype=np.int64)
            self._kernels[1](self._values, self._starts, self._last_sums, u, slots)
            return slots
        remainder = np.minimum(u * self._last_sums[-1], np.nextafter(self._last_sums[-1], 0.0))
        nodes: Indices = self._last_sums.searchsorted(remainder, side="right").astype(np.int64, copy=False)
        remainder -= self._sums_before.take(nodes)
        columns = np.arange(len(nodes))
        for children in reversed(self._levels):
            # A row for each child, after one of zeros: whole rows, end to end, are added and compared.
            sums = np.zeros((_FAN_OUT + 1, len(nodes)))
            if len(nodes) <= _FEW:
                np.add.accumulate(children.take(nodes, axis=0).T, axis=0, out=sums[1:])
            else:
                sums[1:] = children.take(nodes, axis=0).T
                for before, running in pairwise(sums[1:]):
                    running += before
            if np.count_nonzero(remainder >= sums[-1]):
                np.minimum(remainder, np.nextafter(sums[-1], 0.0), out=remainder)
            child = np.add.reduce((sums[1:] <= remainder).view(np.uint8), axis=0, dtype=np.uint8).astype(np.int64)
            nodes = (nodes << _SHIFT) + child
            remainder -= sums.reshape(-1).take(child * len(columns) + columns)
        return nodes


def _aligned_zeros(size: int) -> Weights:
    """Return zeros that begin with a cache line, so that a node fills two of them and touches no third."""
    words = np.zeros(size + _LINE)
    return words[-words.ctypes.data // 8 % _LINE :][:size]


def _node_counts(size: int) -> list[int]:
    """Return the number of nodes of each level, leaves first; the last is at most `_LAST_LEVEL`."""
    counts = [(size + _FAN_OUT - 1) >> _SHIFT]
    while counts[-1] > _LAST_LEVEL:
        counts.append((counts[-1] + _FAN_OUT - 1) >> _SHIFT)
    return counts


def _write_kernel(values: Any, starts: Any, last_values: Any, last_sums: Any, slots: Any, weights: Any) -> float:
    """Do as `SumTree.set`; what is returned means nothing."""
    touched = 0.0  # reads are not waited for, so that the writes find their lines in the cache
    for k in range(len(slots)):
        touched += values[slots[k]] + values[slots[k] ^ _LINE]
    for k in range(len(slots)):
        values[slots[k]] = weights[k]
    levels = len(starts) - 1
    for level in range(levels):
        before = -1
        for k in range(len(slots)):
            node = slots[k] >> (_SHIFT * (level + 1))
            if node == before:
                continue
            before = node
            first = starts[level] + (node << _SHIFT)
            total = 0.0
            for child in range(first, first + _FAN_OUT):
                total += values[child]
            if level + 1 < levels:
                values[starts[level + 1] + node] = total
            else:
                last_values[node] = total
    running = 0.0
    for node in range(len(last_values)):
        running += last_values[node]
        last_sums[node] = running
    return touched


def _draw_kernel(values: Any, starts: Any, last_sums: Any, u: Any, slots: Any) -> float:
    """Draw level by level; what is returned means nothing.

    A level's nodes are read once before they are searched: with nothing else to do the processor reads
    many at a time. On the way from the root to one leaf after another it would wait for each of them.
    """
    total = last_sums[-1]
    below_total = np.nextafter(total, 0.0)
    remainders = np.empty(len(u))
    for k in range(len(u)):
        slots[k] = 0
        remainders[k] = min(u[k] * total, below_total)
    left = len(last_sums)
    while left > 1:  # for all numbers at once: vector instructions, and no branch to guess wrong
        half = left >> 1
        for k in range(len(u)):
            slots[k] += half * (last_sums[slots[k] + half - 1] <= remainders[k])
        left -= half
    for k in range(len(u)):
        if slots[k] > 0:
            remainders[k] -= last_sums[slots[k] - 1]
    sums = np.empty(_FAN_OUT)
    touched = 0.0
    for level in range(len(starts) - 2, -1, -1):
        for k in range(len(u)):
            slots[k] = starts[level] + (slots[k] << _SHIFT)
            touched += values[slots[k]] + values[slots[k] + _LINE]
        for k in range(len(u)):
            running = 0.0
            for child in range(_FAN_OUT):
                running += values[slots[k] + child]
                sums[child] = running
            remainder = remainders[k]
            if remainder >= running:
                remainder = np.nextafter(running, 0.0)
            child = 0
            for place in range(_FAN_OUT):
                child += sums[place] <= remainder
            slots[k] += child - starts[level]
            remainders[k] = remainder - (sums[child - 1] if child > 0 else 0.0)
    return touched


def _choose_kernels(size: int, fast: bool | None) -> Kernels | None:
    if fast is False or (fast is None and size < _COMPILE_FROM):
        return None
    kernels = _compiled()
    if kernels is None and fast:
        raise ConfigError(['fast=True needs numba: pip install "learnit_r8[fast]", or leave fast at None'])
    return kernels


@functools.cache
def _compiled() -> Kernels | None:
    try:
        njit = importlib.import_module("numba").njit
    except ImportError:
        return None
    array, ints = "float64[::1]", "int64[::1]"
    write = f"float64({array}, {ints}, {array}, {array}, {ints}, {array})"
    draw = f"float64({array}, {ints}, {array}, {array}, {ints})"
    try:
        return njit(write, cache=True, nogil=True)(_write_kernel), njit(draw, cache=True, nogil=True)(_draw_kernel)
    except RuntimeError:  # no folder to cache in
        return njit(write, nogil=True)(_write_kernel), njit(draw, nogil=True)(_draw_kernel)
