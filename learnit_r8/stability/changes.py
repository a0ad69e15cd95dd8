"""How far the arrays of a training state moved between two copies of it, and which moved beyond their habit.

A loss that jumps says little by itself: adversarial, reinforcement and annealed losses jump by design, and so does
a loss whose data or terms change. But then the weights go on moving as they always did. A lost layer, a burst of the
learning rate or a flipped exponent moves the weights first, and much further.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learnit_r8.stability.tree_copy import TreeCopy

DAMAGE = 0.3  # Least relative change that counts as damage
HABIT = 6.0  # So many times its habit must an array move
BEYOND = 4.0  # No habit explains more: weights five times as large
UNKNOWN = 2.0  # The least change of an array whose habit is not known: early updates may double small weights
_FADE, _GROWTH = 0.5, 2.0  # of a habit, at most, from one backup to the next
_CHUNK = 1 << 14  # elements: two operands and their difference stay in the L2 cache
_SAMPLES, _STRETCH = 16, 1 << 9  # stretches of a large array that stand for all of it, and elements of each
_SMALL = 0.5  # of the median array's norm
_LOST = 0.05  # of its norm before: an array that was lost has begun to grow again when it is looked at
_DERIVED = re.compile(
    r"(^|[/.])(opt\w*|\w*optim\w*|state/\d+/\w+|exp_avg\w*|max_exp_avg\w*|momentum\w*|velocity|square_avg|grad_avg|grads?|"
    r"acc_delta|running_mean|running_var|mu|nu|trace|m|v)([/.]|$)"
)
"""Arrays that follow the gradients or the data: these may jump wherever the loss does, while the weights are sound."""


def relative_changes(new: TreeCopy, old: TreeCopy, *, sampled: bool = False) -> dict[str, float]:
    """Return |new - old| / min(|new|, |old|) (root mean squares) of each weight array, by path.

    The divisor is half of the median array's norm at least: what is small beside the others, as a bias that the
    loss does not depend on, may well move by many times itself. The change of one that is lost and was not small is
    infinite.

    Left out are arrays of one element or of zeros before, arrays whose layout changed, and the state of optimizers
    and of running statistics. It is infinite, too, where a norm overflows, and for NaN. `sampled`: sixteen stretches of
    each large array will do, as what is usual is an average anyway.
    """
    before = {path: array for path, array in old.arrays if not _derived(path)}
    norms: dict[str, tuple[float, float, float]] = {}
    for path, array in new.arrays:
        earlier = before.get(path)
        if earlier is None or tuple(earlier.shape) != tuple(array.shape) or earlier.dtype != array.dtype:
            continue
        found = _norms(array, earlier, sampled=sampled)
        if found is not None:
            norms[path] = found
    usual = sorted(was for _, _, was in norms.values())
    floor = _SMALL * usual[len(usual) // 2] if usual else 0.0
    return {
        path: math.inf if now < _LOST * was >= _LOST * floor else _ratio(moved, max(min(now, was), floor))
        for path, (moved, now, was) in norms.items()
    }


@lru_cache(1 << 16)
def _derived(path: str) -> bool:
    return _DERIVED.search(path) is not None


def _ratio(moved: float, norm: float) -> float:
    ratio = moved / norm if norm > 0.0 else math.inf
    return ratio if math.isfinite(ratio) else math.inf


def _norms(new: Any, old: Any, *, sampled: bool = False) -> tuple[float, float, float] | None:
    """Return the root mean squares of `new - old`, `new` and `old`; None where they say nothing."""
    size = math.prod(new.shape)
    if size < 2:
        return None
    moved = after = before = 0.0
    count = 0
    with np.errstate(all="ignore"):
        for x, y in zip(_chunks(new, sampled), _chunks(old, sampled), strict=True):
            difference = x - y
            moved += float(difference.dot(difference))
            after += float(x.dot(x))
            before += float(y.dot(y))
            count += len(x)
    if before == 0.0 or not math.isfinite(before):
        return None
    return _root(moved / count), _root(after / count), _root(before / count)


def _root(square: float) -> float:
    return math.sqrt(square) if math.isfinite(square) else math.inf


def _chunks(array: Any, sampled: bool) -> Iterator[NDArray[Any]]:
    """Yield a float array, or a CPU tensor, piece by piece as float32 or float64 vectors; nothing for integers."""
    if not isinstance(array, np.ndarray):
        if not array.is_floating_point():
            return
        if array.element_size() < 4:
            array = array.float()
        array = array.numpy()
    elif array.dtype.kind != "f":
        return
    flat = array.ravel(order="K")
    if sampled and flat.size > _SAMPLES * _STRETCH:
        rows = flat[: flat.size - flat.size % _SAMPLES].reshape(_SAMPLES, -1)
        flat = rows[:, :_STRETCH].ravel()
    for start in range(0, flat.size, _CHUNK):
        piece = flat[start : start + _CHUNK]
        yield piece if piece.itemsize >= 4 else piece.astype(np.float32)


class Habits:
    """How far each array usually moves, per unit of the learning rate's sum over steps: a higher rate moves more."""

    def __init__(self) -> None:
        self._usual: dict[str, float] = {}

    def learn(self, changes: Mapping[str, float], path: float) -> None:
        """Take the changes of a sound stretch, over which the learning rates sum to `path`."""
        if path <= 0.0:
            return
        for name, moved in changes.items():
            usual = self._usual.get(name, math.inf)
            share = min(moved / path, _GROWTH * usual)  # one jump is no habit
            if math.isfinite(share):
                self._usual[name] = share if usual == math.inf else max(share, _FADE * usual)

    def broken(
        self, changes: Mapping[str, float], path: float, *, unknown: float = UNKNOWN, habit: float = HABIT
    ) -> dict[str, float]:
        """Return those changes over a stretch that no habit explains; `unknown` limits an array without one."""
        limits = {name: min(BEYOND, max(DAMAGE, habit * usual * path)) for name, usual in self._usual.items()}
        return {name: moved for name, moved in changes.items() if moved > limits.get(name, unknown)}


def copied(paths: Iterable[str], state: TreeCopy) -> set[str]:
    """Return those of the paths whose array is nearly another one of the state: a target network that was updated."""
    arrays = {path: array for path, array in state.arrays if tuple(array.shape)}
    found = set()
    for path in paths:
        mine = arrays[path]
        for other, array in arrays.items():
            if other == path or array.shape != mine.shape or array.dtype != mine.dtype:
                continue
            norms = _norms(mine, array)
            if norms is not None and _ratio(norms[0], min(norms[1:])) < DAMAGE:
                found.add(path)
                break
    return found
